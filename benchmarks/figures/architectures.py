"""Figures of models with the same compute, and of watching their routers, from the records."""

from __future__ import annotations

from pathlib import Path

from benchmarks.figures.markdown import link, read, size_of, table, to_be_made, wrapped


def quality_per_flop(records: Path) -> str:
    """Costs and scores of models of equal compute, and the claims with their verdicts."""
    file = records / "quality_per_flop.json"
    if not file.exists():
        return "\n".join(to_be_made(["`python -m benchmarks quality_per_flop`"]))
    found = read(file)
    scale, planned = found["scale"], found["planned"]
    contexts = list(next(iter(found["models"].values()))["bytes_per_decoded_token"])
    rows = []
    for entry in found["models"].values():
        per_token = entry["bytes_per_decoded_token"]
        score = entry.get("bits_per_byte")
        rows.append(
            [
                entry["words"],
                f"{entry['flops_of_reference']:.3f}",
                f"{entry['parameters'] / 1e6:.2f}",
                f"{entry['active_parameters'] / 1e6:.2f}",
                " / ".join(f"{per_token[context] / 1e6:.1f}" for context in contexts),
                "{median:.3f} ({min:.3f} to {max:.3f})".format(**score) if score else "–",
                str(len(entry["seeds"])),
            ]
        )
    claims = []
    for claim in found["claims"]:
        mean, ends = claim["mean"], claim["interval"]
        claims.append(
            [
                claim["claim"],
                "–" if mean is None else f"{mean:+.4f}",
                "–" if ends is None else f"{ends[0]:+.4f} to {ends[1]:+.4f}",
                str(claim["n"]),
                claim["verdict"],
            ]
        )
    reference = found["models"][scale["reference"]]
    seeds = sorted({len(entry["seeds"]) for entry in found["models"].values()})
    optimizer = [entry["optimizer_of_flops"] for entry in found["models"].values()]
    made = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else str(seeds[0])
    text = (
        f"Record: {link(file.name, file.name)}. {made} of {planned['seeds']} planned seeds. "
        f"{scale['updates']} updates of {scale['tokens_per_update']:,} tokens, "
        f"{scale['tokens'] / 1e6:.2f} million tokens in all. FLOPs are those of one trained token, "
        f"in multiples of {reference['flops_per_token'] / 1e6:.2f} million (the "
        f"{reference['words']}). Parameters in millions. Bytes are megabytes read for a decoded "
        f"token after {' / '.join(f'{int(c):,}' for c in contexts)} tokens. Bits per byte are of "
        f"{scale['held_out_bytes']:,} held-out bytes after the last update: median, smallest and "
        "largest seed. The matrix products of the optimizer are not counted; beside the FLOPs of "
        f"an update they are {min(optimizer):.0%} to {max(optimizer):.0%}."
    )
    about = (
        "The difference is that of the two models in a claim, in bits per byte, mean over seeds; "
        f"below zero the first one is better. The interval has {found['confidence']:.0%} "
        f"confidence. A difference of {found['claims'][0]['margin']} matters, and "
        f"{found['least_seeds']} seeds are the fewest for a verdict."
    )
    heads = [
        "model", "FLOPs", "parameters", "active", "bytes per token", "bits per byte", "seeds"
    ]  # fmt: skip
    verdicts = table(["claim", "difference", "interval", "seeds", "verdict"], claims)
    return f"{wrapped(text)}\n\n{table(heads, rows)}\n\n{wrapped(about)}\n\n{verdicts}"


def router_statistics(records: Path) -> str:
    """What the balance of the routers costs in the training log."""
    file = records / "router_statistics.json"
    if not file.exists():
        return "\n".join(to_be_made(["`python -m benchmarks router_statistics`"]))
    found = read(file)
    shares = " and ".join(
        f"{entry['share']['median']:.2%} of an update of {entry['batch_size']} x "
        f"{entry['length']} tokens (largest of {entry['share']['n']}: {entry['share']['max']:.2%})"
        for entry in found["results"]
    )
    first = found["results"][0]
    return wrapped(
        f"For the model `{found['model']}` with {size_of(found)}, which has {first['routers']} "
        f"routers of {first['experts']} experts, they take {shares} ({link(file.name)})."
    )
