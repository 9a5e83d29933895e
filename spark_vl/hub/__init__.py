"""Publishing on the Hugging Face Hub: models with their cards, judgments that `datasets` loads, a demo."""

from spark_vl.hub.client import HubError
from spark_vl.hub.publish import publish_judgments, publish_model, publish_space
from spark_vl.hub.release import ReleaseError

__all__ = ["HubError", "ReleaseError", "publish_judgments", "publish_model", "publish_space"]
