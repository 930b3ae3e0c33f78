"""Writing text with a model: `generate` and `stream`.

decoding      the loop: read the prompts, then one token at a time
prefill       prompts of any lengths become one padded tensor, and are read into a cache
sampling      from logits to a token
speculative/  several tokens at a time, drafted by the MTP module and verified exactly
"""

from nemotron_lite.generation.decoding import generate, stream

__all__ = ["generate", "stream"]
