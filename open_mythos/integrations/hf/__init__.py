"""OpenMythos in Hugging Face transformers. Importing this lets the ``Auto`` classes load its folders.

Needs the extra: ``pip install ".[hf]"`` in a checkout of this library.
"""

from open_mythos.install import missing

try:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
except ImportError as error:
    raise missing("transformers is not installed", "hf") from error

from open_mythos.integrations.hf import remote_code
from open_mythos.integrations.hf.base import OpenMythosPreTrainedModel as OpenMythosPreTrainedModel
from open_mythos.integrations.hf.configuration_open_mythos import OpenMythosConfig as OpenMythosConfig
from open_mythos.integrations.hf.modeling_open_mythos import OpenMythosForCausalLM as OpenMythosForCausalLM
from open_mythos.integrations.hf.modeling_open_mythos import (
    OpenMythosForSequenceClassification as OpenMythosForSequenceClassification,
)
from open_mythos.integrations.hf.modeling_open_mythos import OpenMythosModel as OpenMythosModel

AutoConfig.register(OpenMythosConfig.model_type, OpenMythosConfig, exist_ok=True)
AutoModel.register(OpenMythosConfig, OpenMythosModel, exist_ok=True)
AutoModelForCausalLM.register(OpenMythosConfig, OpenMythosForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(OpenMythosConfig, OpenMythosForSequenceClassification, exist_ok=True)

OpenMythosConfig.write_code = OpenMythosPreTrainedModel.write_code = staticmethod(remote_code.write)
