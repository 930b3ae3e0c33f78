"""Writing text with a model.

options           the options of `generate` and `stream`, and their defaults
generate          `generate` and `stream`: read the prompts, then write one token at a time
prompts           text or token ids, one or many; and text from the tokens written
prefill           rows of any lengths become one padded tensor and are read into a cache
prepared_weights  copies of the weights that a CPU multiplies faster, where they pay
sampling          from logits to a token
speculative/      several tokens at a time, drafted by the MTP module and verified exactly

The public names are in `nemotron_lite` itself: `from nemotron_lite import generate`. Nothing is
imported here, so that the command line can read the options without waiting for torch.
"""
