"""Wrong answers to chapter 04's exercises: mistakes that real projects have shipped.

Each has to fail, and the message has to name the hint that is given here. Most are the reference
solution with one place changed.
"""

from __future__ import annotations

from nemotron_lite.course.exercises import exercise
from tests.course.chapters.mutants import Mutant


def _with(exercise_id: str, *changes: tuple[str, str]) -> str:
    """The reference solution with places exchanged; each must be there exactly once."""
    source = exercise(exercise_id).solution
    for old, new in changes:
        assert source.count(old) == 1, f"{exercise_id}: {old!r} is there {source.count(old)} times"
        source = source.replace(old, new)
    return source


MUTANTS: dict[str, list[Mutant]] = {
    "04.route": [
        Mutant(
            name="a softmax",
            source=_with(
                "04.route",
                (
                    "torch.sigmoid(x.float() @ weight.float().T)",
                    "torch.softmax(x.float() @ weight.float().T, dim=-1)",
                ),
            ),
            hint=1,
            bug="The router of Mixtral and of the first LatentMoE experiments; Nemotron 3 scores "
            "each expert by itself.",
        ),
        Mutant(
            name="a product in bfloat16",
            source=_with("04.route", ("x.float() @ weight.float().T", "(x @ weight.T).float()")),
            hint=1,
            bug="The router follows the dtype of the model. sgl-project/sglang#31213: 238 biases "
            "became 8 different ones.",
        ),
        Mutant(
            name="the bias left out",
            source=_with("04.route", ("(scores + bias).topk", "scores.topk")),
            hint=2,
            bug="A checkpoint that was balanced by its bias is run without it.",
        ),
        Mutant(
            name="the bias in the weights",
            source="""
import torch


def route(x, weight, bias, top_k, scale):
    scores = torch.sigmoid(x.float() @ weight.float().T)
    chosen, indices = (scores + bias).topk(top_k, dim=-1)
    weights = scale * chosen / chosen.sum(-1, keepdim=True)
    return weights, indices, scores
""",
            hint=2,
            bug="topk returns values as well, and they are taken (vllm-project/vllm#12002, "
            "huggingface/transformers#39581, PaddlePaddle/PaddleFormers#3452).",
        ),
        Mutant(
            name="divided by the sum of all scores",
            source=_with(
                "04.route", ("chosen.sum(-1, keepdim=True)", "scores.sum(-1, keepdim=True)")
            ),
            hint=3,
            bug="Normalized over all experts: the routed sum is far too small.",
        ),
        Mutant(
            name="no scale",
            source=_with("04.route", ("scale * chosen", "chosen")),
            hint=3,
            bug="routed_scaling_factor is read from the config and not used.",
        ),
        Mutant(
            name="not divided at all",
            source=_with("04.route", (" / chosen.sum(-1, keepdim=True)", "")),
            hint=3,
            bug="norm_topk_prob ignored (NVIDIA/Megatron-LM#1593 asks for it).",
        ),
        Mutant(
            name="divided by the sum of the batch",
            source=_with("04.route", ("chosen.sum(-1, keepdim=True)", "chosen.sum(0)")),
            hint=3,
            bug="The norm over the wrong axis, as with top_k=1 in databricks/megablocks#87.",
        ),
        Mutant(
            name="no gradient to the router",
            source=_with(
                "04.route", ("scores.gather(1, indices)", "scores.detach().gather(1, indices)")
            ),
            hint=3,
            bug="Right values, and a router that never learns (jingyaogong/minimind#858 had none "
            "with one expert per token).",
        ),
    ],
    "04.mix_experts": [
        Mutant(
            name="ReLU without its square",
            source=_with("04.mix_experts", (") ** 2", ")")),
            hint=1,
            bug="hidden_act read as relu; the family uses relu2.",
        ),
        Mutant(
            name="squared before the ReLU",
            source=_with(
                "04.mix_experts",
                (
                    "F.relu(z[tokens] @ up[expert].T) ** 2",
                    "F.relu((z[tokens] @ up[expert].T) ** 2)",
                ),
            ),
            hint=1,
            bug="Negative sums pass as well: nothing is ever zero.",
        ),
        Mutant(
            name="the weight before the expert",
            source=_with(
                "04.mix_experts",
                ("z[tokens] @ up", "(weights[tokens, slots, None] * z[tokens]) @ up"),
                (
                    "weights[tokens, slots, None] * (hidden @ down[expert].T)",
                    "hidden @ down[expert].T",
                ),
            ),
            hint=2,
            bug="Llama 4 multiplies the input; with a squared activation the weight is squared.",
        ),
        Mutant(
            name="weights of the first slot",
            source=_with("04.mix_experts", ("weights[tokens, slots, None]", "weights[tokens, :1]")),
            hint=2,
            bug="The column of the choice is lost when tokens are collected.",
        ),
        Mutant(
            name="weights as if sorted by expert",
            source=_with(
                "04.mix_experts", ("indices == expert", "indices.sort(-1).values == expert")
            ),
            hint=2,
            bug="Indices are sorted and weights are not.",
        ),
        Mutant(
            name="one expert overwrites another",
            source=_with(
                "04.mix_experts", ("y = y.index_add(0, tokens, answers)", "y[tokens] = answers")
            ),
            hint=2,
            bug="Only the last expert of a token is left (deepseek-ai/DeepSeek-V3#942 discusses "
            "y[idx] += for repeated indices).",
        ),
        Mutant(
            name="all experts for all tokens",
            source="""
import torch
import torch.nn.functional as F


def mix_experts(z, up, down, weights, indices):
    dense = weights.new_zeros(len(z), len(up)).scatter(1, indices, weights)
    hidden = F.relu(torch.einsum("td,efd->tef", z, up)) ** 2
    return torch.einsum("tef,edf,te->td", hidden, down, dense)
""",
            hint=3,
            bug="Dense computation with zero weights: right numbers at e / k times the cost, which "
            "is what a mixture was to save.",
        ),
        Mutant(
            name="no gradient to the weights",
            source=_with(
                "04.mix_experts",
                ("weights[tokens, slots, None]", "weights.detach()[tokens, slots, None]"),
            ),
            hint=3,
            bug="The router gets no gradient.",
        ),
    ],
    "04.sort_pairs": [
        Mutant(
            name="the inverse permutation",
            source=_with(
                "04.sort_pairs",
                ("flat.argsort(stable=True)", "flat.argsort(stable=True).argsort()"),
            ),
            hint=1,
            bug="Where a pair goes is taken for which pair comes.",
        ),
        Mutant(
            name="pairs by slot, not by token",
            source=_with("04.sort_pairs", ("indices.flatten()", "indices.T.flatten()")),
            hint=1,
            bug="Slot-major numbers: the kernel that divides by k reads other tokens.",
        ),
        Mutant(
            name="equal experts in reverse",
            source=_with(
                "04.sort_pairs",
                (
                    "flat.argsort(stable=True)",
                    "len(flat) - 1 - flat.flip(0).argsort(stable=True)",
                ),
            ),
            hint=2,
            bug="A sort that is not stable: the sums of a token change from run to run.",
        ),
        Mutant(
            name="the last experts are missing",
            source=_with("04.sort_pairs", (", minlength=experts", "")),
            hint=3,
            bug="bincount stops at the largest expert that was chosen.",
        ),
        Mutant(
            name="ends in place of starts",
            source=_with("04.sort_pairs", ("(1, 0)", "(0, 1)")),
            hint=3,
            bug="Inclusive sums where exclusive ones are needed.",
        ),
    ],
    "04.mixture_of_experts": [
        Mutant(
            name="rows are lost",
            source=_with("04.mixture_of_experts", (".view(x.shape)", "")),
            hint=1,
            bug="The layer works on rows of tokens and returns them.",
        ),
        Mutant(
            name="the selection bias is not used",
            source=_with(
                "04.mixture_of_experts",
                (
                    "bias = self.gate.e_score_correction_bias",
                    "bias = torch.zeros(len(self.gate.weight))",
                ),
            ),
            hint=2,
            bug="The buffer is dropped when a model is loaded (deepspeedai/DeepSpeed#8369).",
        ),
        Mutant(
            name="the shared expert is scaled",
            source=_with(
                "04.mixture_of_experts", ("(routed + everyone)", "(routed + self.scale * everyone)")
            ),
            hint=2,
            bug="The factor of the routed sum on the whole output.",
        ),
        Mutant(
            name="no shared expert",
            source=_with("04.mixture_of_experts", ("(routed + everyone)", "routed")),
            hint=2,
            bug="Weights that are loaded and not used.",
        ),
        Mutant(
            name="routed experts without the scale",
            source=_with("04.mixture_of_experts", ("self.top_k, self.scale)", "self.top_k, 1.0)")),
            hint=2,
            bug="routed_scaling_factor forgotten: the routed experts hardly count.",
        ),
        Mutant(
            name="a router that is counted in part",
            source=_with(
                "04.mixture_of_experts",
                (
                    "up[0].numel() + down[0].numel()",
                    "up[0].numel() + down[0].numel() + up.shape[2]",
                ),
            ),
            hint=3,
            bug="Only the rows of the chosen experts are counted, but all are needed to choose.",
        ),
        Mutant(
            name="all parameters",
            source=_with("04.mixture_of_experts", ("idle = len(up) - self.top_k", "idle = 0")),
            hint=3,
            bug="Total for active parameters: a mixture looks as slow as it is large.",
        ),
    ],
    "04.update_bias": [
        Mutant(
            name="the wrong direction",
            source=_with("04.update_bias", ("total.mean() - total", "total - total.mean()")),
            hint=1,
            bug="Sign: the busiest expert gets busier.",
        ),
        Mutant(
            name="a step in proportion to the load",
            source=_with(
                "04.update_bias",
                ("torch.sign(total.mean() - total)", "(total.mean() - total) / total.mean()"),
            ),
            hint=2,
            bug="The step depends on the batch; one very busy expert moves everything.",
        ),
        Mutant(
            name="the mean load counts as too much",
            source=_with(
                "04.update_bias",
                (
                    "torch.sign(total.mean() - total)",
                    "torch.where(total < total.mean(), 1.0, -1.0)",
                ),
            ),
            hint=2,
            bug="A balanced router is pushed down for ever.",
        ),
        Mutant(
            name="the first device only",
            source=_with("04.update_bias", ("loads.sum(0)", "loads[0]")),
            hint=3,
            bug="No all-reduce of the counts (pytorch/torchtitan#1114 adds it): devices drift "
            "apart.",
        ),
        Mutant(
            name="every device for itself",
            source="""
import torch


def update_bias(bias, loads, rate):
    each = loads.to(bias.dtype)
    return bias + rate * torch.sign(each.mean(1, keepdim=True) - each).mean(0)
""",
            hint=3,
            bug="The mean of the signs is not the sign of the sum.",
        ),
    ],
    "04.balance_loss": [
        Mutant(
            name="not divided by k",
            source=_with("04.balance_loss", ("(top_k * tokens)", "tokens")),
            hint=1,
            bug="The loss of a balanced router is k, not 1 (huggingface/transformers#28255).",
        ),
        Mutant(
            name="without the factor e",
            source=_with("04.balance_loss", ("experts * (share", "(share")),
            hint=1,
            bug="A coefficient from a paper means something else for every number of experts.",
        ),
        Mutant(
            name="the whole batch at once",
            source=_with(
                "04.balance_loss",
                (".sum((1, 2))", ".sum((0, 1, 2))"),
                ("(top_k * tokens)", "(top_k * tokens * len(scores))"),
                (".mean(1)", ".mean((0, 1))"),
            ),
            hint=2,
            bug="The loss of the batch for that of a sequence: opposite sequences cancel.",
        ),
        Mutant(
            name="the mean score of all experts",
            source=_with(
                "04.balance_loss",
                ("(share * preference).sum(-1)", "(share * preference.mean()).sum(-1)"),
            ),
            hint=1,
            bug="Shapes that broadcast to a constant (mindspore-ai/hyper-parallel#752).",
        ),
        Mutant(
            name="scores that are not normalized",
            source=_with(
                "04.balance_loss", ("(scores / scores.sum(-1, keepdim=True))", "(2 * scores / 2)")
            ),
            hint=1,
            bug="Sigmoid scores do not add up to 1: the loss can be lowered by making all small.",
        ),
        Mutant(
            name="normalized over the chosen",
            source=_with(
                "04.balance_loss",
                (
                    "scores.sum(-1, keepdim=True)",
                    "scores.gather(-1, chosen).sum(-1, keepdim=True)",
                ),
            ),
            hint=1,
            bug="The weights of the router in place of its preference.",
        ),
        Mutant(
            name="no gradient",
            source=_with(
                "04.balance_loss", ("preference = (scores", "preference = (scores.detach()")
            ),
            hint=3,
            bug="A constant is added to the loss, and nothing is balanced.",
        ),
    ],
}
