"""What is known of a model family is in `families/` and nowhere else."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from spark_vl.config import TrainConfig
from spark_vl.families import read_facts
from spark_vl.families.base import ModelInputs
from spark_vl.families.registry import FAMILIES, get_family
from spark_vl.policy.packing import PROMPT, PackItem, make_pack
from spark_vl.prompts import Templater

PACKAGE = Path(__file__).parents[1] / "spark_vl"
FREE = ("families", "demo", "doctor")
"""The demo's model is one of a family, and the doctor tries one."""
NAMES = (
    r"qwen(?!-vl-utils)|llava|gemma|internvl|mistral",  # qwen-vl-utils: a package whose version a run notes
    # What tokens are called, and their spelling; "tool_calls" is a word of OpenAI's protocol.
    r"<\\?\||\|>|<｜|tool_call(?!s\b)|im_(start|end)|endoftext|(vision|box|object_ref)_(start|end|pad)|(image|video)_(pad|token_)",
    # What a model's modules, their inputs and settings are called.
    r"\bmodel\.model\b|\.model\.model|language_model|\.visual\b|get_image_features|get_rope_index|rope_deltas|_proj\b",
    r"image_grid_thw|mm_token_type_ids|deepstack|visual_pos_masks|\.text_config\b",
)


def leaks(text: str) -> list[str]:
    return [match[0] for pattern in NAMES for match in re.finditer(pattern, text, re.IGNORECASE)]


def test_no_other_module_knows_a_family():
    found = {}
    for file in sorted(PACKAGE.rglob("*")):
        if file.suffix in (".py", ".yaml", ".jinja") and file.relative_to(PACKAGE).parts[0] not in FREE:
            text = file.read_text("utf-8").replace(f'"{TrainConfig().model.path}"', "")
            found |= {str(file.relative_to(PACKAGE)): names} if (names := leaks(text)) else {}
    assert found == {}


@pytest.mark.parametrize(
    "line",
    [
        '"""Models of the Qwen2.5-VL family."""',
        'if config.get("model_type") != "qwen2_5_vl":',
        "policy.model.model.language_model(",
        "hidden_TH = self.model.model(",
        "model.model.visual.requires_grad_(False)",
        'target_modules=r".*language_model\\.layers\\..*_proj",',
        "is_image = ids_BS == self.processor.image_token_id",
        'return re.sub("<(?=[|｜]|/?tool_call>)", "<\\u200b", text)',
        '_MARKER = re.compile(r"<\\|box_(?:start|end)\\|>")',
        "image_grid_thw=pack.image_grid_thw,",
        "DynamicCache(config=self.policy.model.config.text_config)",
    ],
)
def test_the_search_finds_a_leak(line):
    assert leaks(line)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_has_its_code_and_its_facts(model_type):
    facts = read_facts(model_type)
    assert get_family(model_type).reserved == tuple(facts["reserved"])
    assert facts["shapes"].keys()
    templater = Templater.load(reserved=get_family(model_type).reserved)
    for text in facts["reserved"]:
        assert text not in templater.neutralize(text)


def test_each_file_of_facts_is_that_of_a_registered_family():
    names = [file.name for file in files("spark_vl.families").iterdir() if file.name.endswith(".yaml")]
    assert sorted(names) == sorted(f"{model_type}.yaml" for model_type in FAMILIES)


def test_where_no_model_is_known_the_tokens_of_every_family_are_neutralized():
    templater = Templater.load()
    for model_type in FAMILIES:
        for text in read_facts(model_type)["reserved"]:
            assert text not in templater.neutralize(f"a{text}b")


def test_a_family_without_a_vision_tower_packs_plain_positions_and_no_image():
    """Positions without leading dimensions, and padding without an image, as a language model alone has them."""
    prompt, padding = (ModelInputs(input_ids=torch.arange(n), position_ids=torch.arange(n), images=()) for n in (3, 1))
    pack = make_pack([PackItem(prompt, [[7, 8], [9]], [0, 1])], padding=padding)
    assert pack.position_ids.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert pack.segment_T.tolist() == [PROMPT, PROMPT, PROMPT, 0, 0, 1]
    assert pack.images == ()
    assert pack.to(torch.device("cpu")).input_ids.tolist() == [[0, 1, 2, 7, 8, 9]]
