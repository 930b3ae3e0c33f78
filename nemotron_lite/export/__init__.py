"""A model in files of other programs: `to_gguf` writes one that llama.cpp runs.

    gguf                the writer: all checks first, then one tensor at a time
    gguf_config         which keys hold the sizes, and which configs have no place in them
    gguf_tensors        the names, shapes and number formats of the tensors
    gguf_tokenizer      a byte-level BPE tokenizer as keys of the file

Everything here needs the extra `export`. Programs that read Hugging Face's folders (transformers,
vLLM, mlx-lm) need no export: `save` writes such a folder.
"""

from nemotron_lite.export.gguf import ExportError, to_gguf

__all__ = ["ExportError", "to_gguf"]
