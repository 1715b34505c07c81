"""The names that users of the reference implementation import from here. Nothing inside the package imports this."""

from open_mythos.config import MythosConfig as MythosConfig
from open_mythos.model import OpenMythos as OpenMythos
from open_mythos.nn.attention import GQAttention as GQAttention
from open_mythos.nn.attention import MLAttention as MLAttention
from open_mythos.nn.block import TransformerBlock as TransformerBlock
from open_mythos.nn.feed_forward import Expert as Expert
from open_mythos.nn.feed_forward import MoEFFN as MoEFFN
from open_mythos.nn.halting import ACTHalting as ACTHalting
from open_mythos.nn.injection import LoRAAdapter as LoRAAdapter
from open_mythos.nn.injection import LTIInjection as LTIInjection
from open_mythos.nn.linear import RMSNorm as RMSNorm
from open_mythos.nn.recurrent import RecurrentBlock as RecurrentBlock
from open_mythos.ops.loop_index import loop_index_embedding as loop_index_embedding
from open_mythos.ops.rope import apply_rope as apply_rope
from open_mythos.ops.rope import precompute_rope_freqs as precompute_rope_freqs
