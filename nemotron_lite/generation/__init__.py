"""Writing text with a model.

options           the options of `generate` and `stream`; defaults of a model: defaults
generate          `generate` and `stream`: read the prompts, then write one token at a time
run               one such call: its arguments checked, its rows given back as they came
prompts           text or token ids, one or many; and text from the tokens written: text_rows
prefill           rows of any lengths become one padded tensor and are read into a cache
decoding          pass by pass, for a cache of its own or the caller's; its rows: written_row
adjustments       repetition penalty and logits processors, before sampling
sampling          from logits to a token
speculative/      several tokens at a time, drafted by the MTP module and verified exactly
results           what a call returns beside the text; counts and times: statistics
prepared_weights  copies of the weights that a CPU multiplies faster, where they pay
decode_step       one step with the cache as tensors, for `torch.export`
score             log-likelihoods of texts; harness: the package as a model of `lm_eval`
chat              a conversation: messages, a chat template (chat_template), thinking apart

The public names are in `nemotron_lite` itself: `from nemotron_lite import generate`. Nothing is
imported here, so that the command line can read the options without waiting for torch.
"""
