"""Diagnostics of a model: what each loop does, and its costs in parameters, FLOPs and memory."""

from open_mythos.diagnostics.cost import Parameters as Parameters
from open_mythos.diagnostics.cost import bytes_per_decoding_step as bytes_per_decoding_step
from open_mythos.diagnostics.cost import cache_bytes as cache_bytes
from open_mythos.diagnostics.cost import cache_bytes_per_token as cache_bytes_per_token
from open_mythos.diagnostics.cost import flops_of_prompt as flops_of_prompt
from open_mythos.diagnostics.cost import flops_per_prompt_token as flops_per_prompt_token
from open_mythos.diagnostics.cost import flops_per_token as flops_per_token
from open_mythos.diagnostics.cost import flops_per_trained_token as flops_per_trained_token
from open_mythos.diagnostics.cost import parameters as parameters
from open_mythos.diagnostics.spectral import loop_gain as loop_gain
from open_mythos.diagnostics.spectral import spectral_radius as spectral_radius
from open_mythos.diagnostics.trace import Trace as Trace
from open_mythos.diagnostics.trace import trace as trace
