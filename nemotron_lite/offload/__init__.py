"""Models larger than the memory: each weight is fetched when a layer runs, and let go afterwards.

Super has 120.7 billion parameters, 241 GB in BF16. A token uses 12.8 billion of them: all matrices
of the Mamba and attention layers, and 22 of the 512 experts of each mixture. So a machine with a
few gigabytes of memory can run all 88 layers if the weights come from somewhere else.

    source     where weights come from: `read(name, out, expert=, row=)` fills a buffer
                   generated.GeneratedWeights          numbers computed from a seed
                   checkpoint.file_source.FileWeights  files of a checkpoint, read where they lie
    plan       which weights stay in memory, within a budget of bytes
    store      the weights in memory, and one workspace for all others
    experts    routed experts that fetch the matrices of the experts that tokens chose
    model      a Nemotron whose modules fetch their own tensors before they run

    model = Nemotron.from_config(config, weights="generated", seed=0)        generated
    model = load(path, packed=True, offload=True)                            from files

Nothing else differs from a model in memory: the modules, their classes and their products are the
same, and so are the results (up to the rounding that the order of a sum makes in float32). A module
is a layer's matrix, norm or convolution. Of the embedding only the rows of the tokens are read, and
of a stack of experts only the experts that some token chose, each once per layer and call.

**What stays in memory.** A token uses the layers one after the other, and the next token begins
with the first again. If the least recently used weight of the whole model were evicted, then each
weight would be evicted shortly before it is needed, and nothing would ever be found. So the budget
is divided once, when the model is made:

    1. one workspace, as large as the largest tensor that does not stay
    2. tensors that every token uses, the smallest first; they are never evicted
    3. the rest in equal parts to the layers with experts: each evicts its own least recently used
       experts, but none that the running call uses

A tensor that every token uses saves its whole size at each token. An expert is chosen by one token
in 23, so it saves a 23rd of its size, or more where one token chooses like the one before.

**What it costs.** Every byte that does not stay is read or generated again for each token, and a
prompt is cheaper than its tokens one by one: its layers are fetched once for all of them. The
memory beside the budget is that of any model: activations, the cache of the sequence, PyTorch.
`store.traffic` counts what was used and what was fetched; `count_flops` counts the arithmetic.
docs/benchmarks.md has the measured times.

Left out: GPUs, fetching the next layer while one computes, training, `torch.compile`.
"""

from nemotron_lite.offload.flops import FlopCount, count_flops
from nemotron_lite.offload.generated import GeneratedWeights, generated_model
from nemotron_lite.offload.model import Offloaded, attach_weights, offloaded_class
from nemotron_lite.offload.plan import DEFAULT_BUDGET, Plan
from nemotron_lite.offload.source import WeightSource
from nemotron_lite.offload.store import Traffic, WeightStore

__all__ = [
    "DEFAULT_BUDGET",
    "FlopCount",
    "GeneratedWeights",
    "Offloaded",
    "Plan",
    "Traffic",
    "WeightSource",
    "WeightStore",
    "attach_weights",
    "count_flops",
    "generated_model",
    "offloaded_class",
]
