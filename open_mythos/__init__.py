"""OpenMythos: recurrent-depth transformers whose loop count is chosen at every call."""

from open_mythos.cache import KVCache as KVCache
from open_mythos.checkpoint import CheckpointError as CheckpointError
from open_mythos.config import MythosConfig as MythosConfig
from open_mythos.model import OpenMythos as OpenMythos
from open_mythos.variants import VARIANTS as VARIANTS
from open_mythos.variants import mythos_1b as mythos_1b
from open_mythos.variants import mythos_1t as mythos_1t
from open_mythos.variants import mythos_3b as mythos_3b
from open_mythos.variants import mythos_10b as mythos_10b
from open_mythos.variants import mythos_50b as mythos_50b
from open_mythos.variants import mythos_100b as mythos_100b
from open_mythos.variants import mythos_100m as mythos_100m
from open_mythos.variants import mythos_500b as mythos_500b
from open_mythos.variants import mythos_micro as mythos_micro
from open_mythos.variants import mythos_nano as mythos_nano

__version__ = "0.1.0"
