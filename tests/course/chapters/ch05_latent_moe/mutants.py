"""Wrong answers to chapter 05's exercises: mistakes that real projects have shipped.

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
    "05.step_costs": [
        Mutant(
            name="three matrices for an expert",
            source=_with("05.step_costs", ("expert = 2 * f", "expert = 3 * f")),
            hint=1,
            bug="Estimators that know gated experts only (huggingface/trl#5698); those of "
            "Nemotron 3 have no gate.",
        ),
        Mutant(
            name="multiply-adds in place of FLOPs",
            source=_with("05.step_costs", ("flops = 2 * tokens", "flops = tokens")),
            hint=1,
            bug="MACs are reported as FLOPs: a GPU seems to reach half of what it does.",
        ),
        Mutant(
            name="arithmetic of all experts",
            source=_with("05.step_costs", ("top_k * expert + projections)", "experts * expert)")),
            hint=1,
            bug="FLOPs meters that count a mixture as a dense model of its size.",
        ),
        Mutant(
            name="experts of full width",
            source=_with("05.step_costs", ("width = d if latent is None else latent", "width = d")),
            hint=1,
            bug="moe_latent_size was ignored: 902 GB of weights for Super in place of 225 "
            "(ai-dynamo/aiconfigurator#1143).",
        ),
        Mutant(
            name="no projections",
            source=_with(
                "05.step_costs",
                ("0 if latent is None else 2 * d * latent", "0"),
            ),
            hint=1,
            bug="Code for plain mixtures has no fc1 and fc2 (ml-explore/mlx-lm#1016).",
        ),
        Mutant(
            name="one projection",
            source=_with("05.step_costs", ("else 2 * d * latent", "else d * latent")),
            hint=1,
            bug="The way down is counted, the way up is not.",
        ),
        Mutant(
            name="no projections where latent equals d",
            source=_with("05.step_costs", ("0 if latent is None", "0 if latent in (None, d)")),
            hint=1,
            bug="A config whose latent width equals d is taken for a plain mixture, but it has "
            "fc1 and fc2.",
        ),
        Mutant(
            name="each token reads its own experts",
            source=_with("05.step_costs", ("distinct = experts *", "distinct = tokens * top_k #")),
            hint=2,
            bug="The weights of one token times the batch: no expert is shared, and a large batch "
            "seems to gain nothing.",
        ),
        Mutant(
            name="a full batch at once",
            source=_with(
                "05.step_costs",
                ("distinct = experts *", "distinct = min(experts, tokens * top_k) #"),
            ),
            hint=2,
            bug="The upper bound: as if no two tokens chose the same expert.",
        ),
        Mutant(
            name="all experts for one token",
            source=_with("05.step_costs", ("distinct = experts *", "distinct = experts #")),
            hint=2,
            bug="Kernels that read every expert and multiply with zero.",
        ),
        Mutant(
            name="projections read for every token",
            source=_with(
                "05.step_costs",
                ("(distinct * expert + projections)", "(distinct * expert + tokens * projections)"),
            ),
            hint=2,
            bug="A matrix that all tokens use is read once in a step.",
        ),
        Mutant(
            name="weights in the format of the activations",
            source=_with(
                "05.step_costs", ("weight_bytes * (distinct", "activation_bytes * (distinct")
            ),
            hint=2,
            bug="One dtype for everything: a four-bit checkpoint seems four times as slow.",
        ),
        Mutant(
            name="vectors of full width",
            source=_with("05.step_costs", ("top_k * width *", "top_k * d *")),
            hint=3,
            bug="The dispatch runs before the projection, so what travels is as wide as before.",
        ),
        Mutant(
            name="dispatch without combine",
            source=_with("05.step_costs", ("= 2 * tokens * top_k * w", "= tokens * top_k * w")),
            hint=3,
            bug="One all-to-all of two is counted.",
        ),
        Mutant(
            name="one vector for each token",
            source=_with("05.step_costs", ("tokens * top_k * width", "tokens * width")),
            hint=3,
            bug="A token travels to each of its experts.",
        ),
        Mutant(
            name="activations in the format of the weights",
            source=_with("05.step_costs", ("width * activation_bytes", "width * weight_bytes")),
            hint=3,
            bug="Four-bit weights do not make the vectors smaller.",
        ),
    ],
    "05.equal_cost": [
        Mutant(
            name="the same number of experts",
            source=_with("05.equal_cost", ("alpha * experts\n", "experts\n")),
            hint=1,
            bug="Experts become narrower and not more: the model loses three quarters of its "
            "weights.",
        ),
        Mutant(
            name="alpha times as many per token",
            source=_with(
                "05.equal_cost", ("(budget - fixed) // (2 * f * latent)", "alpha * top_k")
            ),
            hint=2,
            bug="24 for Super: the rule of the paper without the projections and the router.",
        ),
        Mutant(
            name="projections cost nothing",
            source=_with("05.equal_cost", ("2 * d * latent + new_experts", "new_experts")),
            hint=2,
            bug="Comparisons at equal expert weights: the latent model is given more.",
        ),
        Mutant(
            name="one projection",
            source=_with("05.equal_cost", ("2 * d * latent + new", "d * latent + new")),
            hint=2,
            bug="The way back is forgotten.",
        ),
        Mutant(
            name="a router of the old size",
            source=_with("05.equal_cost", ("+ new_experts * d", "+ experts * d")),
            hint=2,
            bug="Four times as many experts need four times as many rows.",
        ),
        Mutant(
            name="a router at latent width",
            source=_with("05.equal_cost", ("+ new_experts * d", "+ new_experts * latent")),
            hint=2,
            bug="The router is said to read the compressed token; it reads the full one.",
        ),
        Mutant(
            name="no router",
            source=_with(
                "05.equal_cost", (" + experts * d\n", "\n"), (" + new_experts * d\n", "\n")
            ),
            hint=2,
            bug="Ledgers leave the router out, because it was small with few experts.",
        ),
        Mutant(
            name="the hidden width is divided too",
            source=_with(
                "05.equal_cost", ("// (2 * f * latent)", "// (2 * (f // alpha) * latent)")
            ),
            hint=2,
            bug="Confused with fine-grained experts (DeepSeekMoE), which divide f and keep d.",
        ),
        Mutant(
            name="rounded up",
            source=_with(
                "05.equal_cost",
                ("(budget - fixed) // (2 * f * latent)", "-((fixed - budget) // (2 * f * latent))"),
            ),
            hint=2,
            bug="The latent model is a little more expensive than what it is compared with.",
        ),
        Mutant(
            name="an exact fit is left out",
            source=_with("05.equal_cost", ("(budget - fixed) //", "(budget - fixed - 1) //")),
            hint=2,
            bug="Less than in place of at most.",
        ),
        Mutant(
            name="widths are rounded",
            source=_with("05.equal_cost", ("alpha < 1 or d % alpha", "alpha < 1")),
            hint=3,
            bug="d // alpha without a test: 64 / 3 becomes 21, and nobody is told.",
        ),
        Mutant(
            name="no expert at all",
            source=_with("05.equal_cost", ("new_top_k < 1", "new_top_k < 0")),
            hint=3,
            bug="A sweep over alpha builds models that choose 0 experts.",
        ),
    ],
    "05.latent_moe": [
        Mutant(
            name="experts of full width",
            source=_with(
                "05.latent_moe",
                ("zeros(e, f, latent)", "zeros(e, f, d)"),
                ("zeros(e, latent, f)", "zeros(e, d, f)"),
            ),
            hint=1,
            bug="A loader takes the width of the experts from hidden_size; llama.cpp had "
            "no other before ggml-org/llama.cpp#20411.",
        ),
        Mutant(
            name="biases in the projections",
            source=_with(
                "05.latent_moe", ("nn.Linear(d, latent, bias=False)", "nn.Linear(d, latent)")
            ),
            hint=1,
            bug="nn.Linear has a bias unless one says otherwise.",
        ),
        Mutant(
            name="rows are lost",
            source=_with("05.latent_moe", (".view(x.shape)", "")),
            hint=1,
            bug="The layer works on rows of tokens and returns them.",
        ),
        Mutant(
            name="the router reads the latent token",
            source=_with(
                "05.latent_moe",
                (
                    "route(rows,",
                    "route(self.fc1_latent_proj(rows) if len(self.gate.weight.T) == "
                    "len(self.fc1_latent_proj.weight) else rows,",
                ),
            ),
            hint=2,
            bug="The gate runs after the projection (vllm-project/vllm#46077). With l = d, as in "
            "tests with small sizes, no shape is wrong.",
        ),
        Mutant(
            name="the shared expert reads the latent token",
            source=_with(
                "05.latent_moe",
                ("shared.up_proj(rows)", "shared.up_proj(z if z.shape == rows.shape else rows)"),
            ),
            hint=2,
            bug="It was built from the config of the routed experts, whose hidden size is l "
            "(PaddlePaddle/PaddleFleet#868).",
        ),
        Mutant(
            name="the shared expert inside the projection",
            source=_with(
                "05.latent_moe",
                (
                    "self.fc2_latent_proj(mixed) + everyone",
                    "self.fc2_latent_proj(mixed + self.fc1_latent_proj(everyone))",
                ),
            ),
            hint=2,
            bug="The sum is formed before the way back, so the shared expert is compressed too.",
        ),
        Mutant(
            name="an activation on the latent token",
            source=_with(
                "05.latent_moe",
                ("z = self.fc1_latent_proj(rows)", "z = F.relu(self.fc1_latent_proj(rows)) ** 2"),
            ),
            hint=2,
            bug="The projection is taken for the first layer of an MLP.",
        ),
        Mutant(
            name="a norm on the latent token",
            source=_with(
                "05.latent_moe",
                (
                    "z = self.fc1_latent_proj(rows)",
                    "z = F.rms_norm(self.fc1_latent_proj(rows), self.experts.up_proj.shape[2:])",
                ),
            ),
            hint=2,
            bug="DeepSeek's latent attention has a norm there, and so have other latent mixtures "
            "(allenai/OLMo-core#799 has one before the way up); Nemotron's has none.",
        ),
        Mutant(
            name="the scale on the whole output",
            source=_with(
                "05.latent_moe",
                (
                    "(self.fc2_latent_proj(mixed) + everyone)",
                    "self.scale * (self.fc2_latent_proj(mixed) + everyone)",
                ),
                ("self.top_k, self.scale)", "self.top_k, 1.0)"),
            ),
            hint=2,
            bug="The routed sum is multiplied later, and the shared expert with it: a kind of "
            "sgl-project/sglang#28237.",
        ),
        Mutant(
            name="the scale twice",
            source=_with(
                "05.latent_moe",
                ("self.fc2_latent_proj(mixed) +", "self.scale * self.fc2_latent_proj(mixed) +"),
            ),
            hint=2,
            bug="Once in the weights and once behind the experts: some projects do the one, some "
            "the other.",
        ),
        Mutant(
            name="no selection bias",
            source=_with(
                "05.latent_moe",
                (
                    "bias = self.gate.e_score_correction_bias",
                    "bias = torch.zeros(len(self.gate.weight))",
                ),
            ),
            hint=2,
            bug="The buffer is dropped when a model is loaded (deepspeedai/DeepSpeed#8369).",
        ),
        Mutant(
            name="frozen projections",
            source=_with(
                "05.latent_moe",
                (
                    "z = self.fc1_latent_proj(rows)",
                    "z = rows @ self.fc1_latent_proj.weight.detach().T",
                ),
            ),
            hint=2,
            bug="The right numbers, and a projection that never learns.",
        ),
        Mutant(
            name="active without the projections",
            source=_with(
                "05.latent_moe",
                (
                    "return total -",
                    "return total - self.fc1_latent_proj.weight.numel() "
                    "- self.fc2_latent_proj.weight.numel() -",
                ),
            ),
            hint=3,
            bug="Ledgers of plain mixtures: the two projections are read for every token.",
        ),
        Mutant(
            name="all parameters",
            source=_with("05.latent_moe", ("idle = len(up) - self.top_k", "idle = 0")),
            hint=3,
            bug="Total for active parameters: a mixture looks as slow as it is large.",
        ),
    ],
    "05.principal": [
        Mutant(
            name="the smallest directions",
            source=_with(
                "05.principal",
                ("directions[:, -latent:]", "directions[:, :latent]"),
                ("energies[-latent:]", "energies[:latent]"),
            ),
            hint=2,
            bug="eigh sorts in ascending order, svd in descending order.",
        ),
        Mutant(
            name="rows for columns",
            source=_with("05.principal", ("directions[:, -latent:]", "directions[-latent:].T")),
            hint=2,
            bug="eigh has the vectors in its columns, svd in the rows of Vh.",
        ),
        Mutant(
            name="directions scaled by their energy",
            source=_with(
                "05.principal",
                (
                    "directions[:, -latent:]",
                    "(directions * energies.clamp(min=0).sqrt())[:, -latent:]",
                ),
            ),
            hint=2,
            bug="The loadings of statistics in place of the directions; W_up W_down is then no "
            "projection.",
        ),
        Mutant(
            name="the mean is subtracted",
            source=_with("05.principal", ("features.T @ features", "features.T.cov()")),
            hint=1,
            bug="PCA of a library: torch.pca_lowrank and scikit-learn center. A projection without "
            "a bias cannot.",
        ),
        Mutant(
            name="the share of the singular values",
            source=_with(
                "05.principal",
                (
                    "kept = energies[-latent:].sum() / energies.sum()",
                    "sizes = energies.clamp(min=0).sqrt()\n"
                    "    kept = sizes[-latent:].sum() / sizes.sum()",
                ),
            ),
            hint=1,
            bug="Not squared: the rank looks higher than it is.",
        ),
        Mutant(
            name="as many directions as tokens",
            source="""
import torch


def principal(features, latent):
    _, sizes, directions = torch.linalg.svd(features, full_matrices=False)
    energies = sizes.square()
    return directions[:latent].T, energies[:latent].sum() / energies.sum()
""",
            hint=1,
            bug="The short form of the SVD has min(t, d) directions: a calibration with few tokens "
            "gives a narrower matrix than the config says.",
        ),
        Mutant(
            name="the energy that is lost",
            source=_with("05.principal", ("energies[-latent:].sum()", "energies[:-latent].sum()")),
            hint=1,
            bug="The share outside of the subspace.",
        ),
        Mutant(
            name="the largest for all",
            source=_with("05.principal", ("energies[-latent:].sum()", "energies[-1]")),
            hint=3,
            bug="The share of the first direction is reported for l of them.",
        ),
    ],
    "05.compress": [
        Mutant(
            name="projections as in and out",
            source=_with(
                "05.compress",
                ("return basis.T, up", "return basis, up"),
                ("down, basis\n", "down, basis.T\n"),
            ),
            hint=1,
            bug="Conv1D of GPT-2 stores `in out`, nn.Linear `out in`.",
        ),
        Mutant(
            name="a factor on the way down",
            source=_with(
                "05.compress", ("return basis.T,", "return basis.T @ basis @ basis.T * 2,")
            ),
            hint=1,
            bug="A factor on the way down: relu2 squares it.",
        ),
        Mutant(
            name="up is turned the other way",
            source=_with(
                "05.compress",
                ("up @ basis,", "up @ (basis.T if basis.shape[0] == basis.shape[1] else basis),"),
            ),
            hint=2,
            bug="A transposed rotation has the right shape where l = d (rotations of QuaRot and "
            "SpinQuant are square).",
        ),
        Mutant(
            name="down is turned the other way",
            source=_with(
                "05.compress",
                (
                    "basis.T @ down",
                    "(basis if basis.shape[0] == basis.shape[1] else basis.T) @ down",
                ),
            ),
            hint=2,
            bug="The same on the way back.",
        ),
        Mutant(
            name="one expert for all",
            source=_with(
                "05.compress", ("up @ basis", "(up @ basis).mean(0, True).expand(len(up), -1, -1)")
            ),
            hint=2,
            bug="Experts are merged where each has to stay itself.",
        ),
        Mutant(
            name="the first columns of down",
            source=_with(
                "05.compress",
                (
                    "basis.T @ down",
                    "down[:, : basis.shape[1]] if "
                    "basis.shape[1] < basis.shape[0] else basis.T @ down",
                ),
            ),
            hint=3,
            bug="Cut off by index, as in pruning, instead of projected.",
        ),
        Mutant(
            name="a constant basis",
            source=_with("05.compress", ("up @ basis,", "up @ basis.detach(),")),
            hint=3,
            bug="Layers that are trained after their compression get only a part of the gradient.",
        ),
    ],
}
