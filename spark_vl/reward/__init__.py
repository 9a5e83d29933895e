"""The model as a judge: is this answer right, and which of two answers is better? (`docs/judging.md`)"""

from spark_vl.reward.average import AveragedWeights
from spark_vl.reward.judge import GenerativeReward
from spark_vl.reward.judgment import Judgment, Ranking, Reply
from spark_vl.reward.lines import judge_file
from spark_vl.reward.self_judge import Measurement, SelfJudge
from spark_vl.reward.trl import JudgeReward

__all__ = [
    "AveragedWeights",
    "GenerativeReward",
    "JudgeReward",
    "Judgment",
    "Measurement",
    "Ranking",
    "Reply",
    "SelfJudge",
    "judge_file",
]
