"""`python -m spark_vl` and `accelerate launch -m spark_vl`."""

from spark_vl.cli import main

main()
