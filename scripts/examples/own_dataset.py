"""Your own dataset: JSON lines beside their images, which `own_dataset.yaml` turns into problems.

    python scripts/examples/own_dataset.py                          # writes a few rows into runs/own_dataset
    spark-vl recipes scripts/examples/own_dataset.yaml              # checks every row
    spark-vl train --config scripts/configs/digits/spark.yaml \
        --data.recipes '[scripts/examples/own_dataset.yaml]' --output_dir runs/own-dataset
"""

import json
from pathlib import Path

from PIL import Image, ImageDraw

if __name__ == "__main__":
    folder = Path(__file__).resolve().parents[2] / "runs" / "own_dataset"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for count in range(1, 9):
        image = Image.new("RGB", (112, 56), "white")
        for place in range(count):
            x, y = 28 * (place % 4), 28 * (place // 4)
            ImageDraw.Draw(image).rectangle((x + 6, y + 6, x + 22, y + 22), fill="navy")
        image.save(folder / "images" / f"{count}.png")
        rows.append({"question": "How many squares are there?", "answer": count, "image": f"images/{count}.png"})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows)} rows: {folder / 'train.jsonl'}")
