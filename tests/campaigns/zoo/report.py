"""The results of the zoo as JSON, as text and as the table in docs/models.md."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.campaigns.zoo.check import Verdict

ORDER = ("right", "none", "refused", "wrong", "crashed", "unbuilt")
TITLES = {
    "causal-lm": "Causal language models",
    "masked-lm": "Masked language models",
    "encoder-decoder": "Encoder-decoder models",
    "vision": "Image classification",
    "vision-language": "Vision-language models",
    "speech": "Speech to text, encoder-decoders",
    "speech-ctc": "Speech to text, encoders",
    "classification": "Text classification",
}
INTRODUCTION = """# Models

`make zoo` generates this page; do not edit it. It covers every model class of eight families of transformers
{transformers} that a tiny configuration can build (torch {torch}, {date}), with random weights.

**The default** is `dropbp.enable(model, 0.5)`, with and without `steps`. Each model trains for as many steps as there
are masks. The call is that of a training loop: with labels, with the model's own cache setting, and with different
lengths for encoder and decoder. The model then trains again, and the call also asks for hidden states and attention
maps. A plain copy of the model trains alongside, and the check compares the two:

- every output and every buffer is bit-identical;
- the gradient of a parameter is that of the plain backward, or `None`; every parameter of a kept branch has one;
- `handle.report()` names the parameters that no step trains, and those outside single branches that are frozen in some
  steps: tied embeddings, position biases, norms of post-norm blocks;
- over 64 steps, the share of the branches' backward FLOPs that PyTorch counts as skipped is 0.5 within 0.02, and so is
  the share that `dropbp` reports, or `dropbp` warned. What is frozen outside the branches saves more; it is not
  counted.

**Any mask**: each branch is dropped alone, and one mask drops two branches in three:

- the forward is bit-identical;
- parameters that only dropped branches use have no gradient (`None`);
- every other gradient equals, to 1e-4 relative, that of a plain backward in which the gradient that enters the dropped
  branch is set to zero in the autograd graph.

| verdict | meaning |
|---|---|
| `right` | all of that holds |
| `refused` | `dropbp.enable` raised an error that names what it did not understand; the model is unchanged, and \
`branches=[...]` may still name what to drop; or a step that asked for more outputs raised one that names the output |
| `none` | the architecture has no residual stream, and `dropbp.enable` said so |
| `unbuilt` | no tiny configuration is known, a package is missing, or plain training of the tiny model fails |
| `wrong`, `crashed` | something differed or failed: a fault of `dropbp` |

| column | meaning |
|---|---|
| *branches* | of the tiny model, mostly 2 to 4 blocks |
| *weights*, *FLOPs* | the share of the used weights, and of the forward's FLOPs, that lies in branches; the rest is \
embeddings, heads, stems and norms, which weigh much in small models |
| *least* | the block with the smallest share of its weights in branches, if not all of them are |
| *called with* | the tensors of the plain call, besides labels; a model of pictures or sound without \
`pixel_values`, `input_features` or `input_values` was tried on text alone |
"""


def results(verdicts: Sequence[Verdict], versions: Mapping[str, str]) -> dict[str, Any]:
    """All results in one dict, which does not depend on the machine."""
    return {
        "versions": dict(versions),
        "counts": {family: _counts(verdicts, family) for family in dict.fromkeys(v.family for v in verdicts)},
        "models": [_without_time(v) for v in verdicts],
    }


def _counts(verdicts: Sequence[Verdict], family: str) -> dict[str, int]:
    found = collections.Counter(v.verdict for v in verdicts if v.family == family)
    return {verdict: found[verdict] for verdict in ORDER}


def _without_time(verdict: Verdict) -> dict[str, Any]:
    entry = dataclasses.asdict(verdict)
    del entry["seconds"]
    return entry


def write(found: Mapping[str, Any], table: Path, data: Path) -> None:
    """Write the two files."""
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    table.write_text(markdown(found), encoding="utf-8")


def text(found: Mapping[str, Any]) -> str:
    """Counts, and one line per verdict other than `right`."""
    lines = [f"{m['verdict']:8} {m['family']:16} {m['name']}: {m['detail']}" for m in _not_right(found)]
    lines += [""] if lines else []
    for family, counts in found["counts"].items():
        lines.append(f"{family:16} " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n))
    total = {verdict: sum(c[verdict] for c in found["counts"].values()) for verdict in ORDER}
    built = sum(total.values()) - total["unbuilt"] - total["none"]
    share = total["right"] / max(1, built)
    lines.append(f"{'all':16} {total['right']} of {built} built that have a residual stream are right ({share:.1%})")
    return "\n".join(lines) + "\n"


def _not_right(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [m for verdict in reversed(ORDER[1:]) for m in found["models"] if m["verdict"] == verdict]


def markdown(found: Mapping[str, Any]) -> str:
    """The generated page."""
    parts = [INTRODUCTION.format(**found["versions"]), _summary(found["counts"]), _warned(found["models"])]
    parts += [f"## {TITLES[family]}\n\n" + _family(found, family) for family in found["counts"]]
    return "\n".join(parts)


def _summary(counts: Mapping[str, Mapping[str, int]]) -> str:
    rows = [[TITLES[family], *(str(c[v]) for v in ORDER)] for family, c in counts.items()]
    rows.append(["all", *(str(sum(c[v] for c in counts.values())) for v in ORDER)])
    return _table(["family", *ORDER], rows)


def _warned(models: Sequence[Mapping[str, Any]]) -> str:
    names = sorted({f"`{model['name']}`" for model in models if model["warned"] and model["verdict"] == "right"})
    return f"Of those that are right, `dropbp` warned in {len(names)} of its budget: {', '.join(names) or 'none'}.\n"


def _family(found: Mapping[str, Any], family: str) -> str:
    models = [m for m in found["models"] if m["family"] == family]
    good = [m for m in models if m["verdict"] == "right"]
    rest = [m for verdict in ORDER[1:] for m in models if m["verdict"] == verdict]
    page = _table(["class", "branches", "weights", "FLOPs", "least", "called with"], [_good_row(m) for m in good])
    if rest:
        page += "\n" + _table(["class", "verdict", "reason"], [[m["name"], m["verdict"], _cell(m)] for m in rest])
    return page


def _good_row(model: Mapping[str, Any]) -> list[str]:
    shares = [f"{model[key]:.0%}" for key in ("weights_in_branches", "flops_in_branches")]
    least = model["least_covered"]
    block, share = (least["block"], least["share"]) if least else ("", 1.0)
    lowest = f"`{block}` {share:.0%}" if share < 0.995 else ""
    return [model["name"], str(model["branches"]), *shares, lowest, _given(model)]


def _given(model: Mapping[str, Any]) -> str:
    """The given arguments, without those that every call of its kind has."""
    names = [name for name in model["given"].split(", ") if name not in ("use_cache", "attention_mask")]
    return ", ".join(f"`{name}`" for name in names)


def _cell(model: Mapping[str, Any]) -> str:
    sentence = model["detail"].split(" Pass example_inputs")[0].split(" Name the branches yourself")[0]
    return " ".join(sentence.replace("|", "/").replace("<", "&lt;").split())[:300]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
