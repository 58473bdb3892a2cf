"""Learned priors on disk: one safetensors file, tensors and a JSON schema of the model they belong to."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributions.constraints import Constraint

from bmaml_ppl.density import Density, from_model
from bmaml_ppl.files import dump_tensors, write_atomically
from bmaml_ppl.generators import seeded
from bmaml_ppl.inference import ALGORITHMS
from bmaml_ppl.learned import LearnedPrior
from bmaml_ppl.model_view import fingerprint
from bmaml_ppl.scaling import Scaling
from bmaml_ppl.template import Template
from bmaml_ppl.types import Inference, Model

__all__ = ["FORMAT_VERSION", "describe_prior", "load_prior", "read_schema", "save_prior"]

FORMAT_VERSION = 1
"""Raised whenever an older reader would misread the file."""

_FORMAT = "bmaml_ppl.prior"
_TOLERANCE = 1e-3

Schema = dict[str, Any]


def save_prior(prior: LearnedPrior, path: str | Path) -> None:
    """Writes a learned prior to one file; what is there is replaced only when the new file is complete.

    The file holds the meta-parameters and the standardisation as tensors, and as JSON what the model must
    look like: neither the model itself, nor data, nor the history.

    Args:
        prior: The learned prior.
        path: Usually ends in `.safetensors`.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: The inference has settings that JSON cannot hold.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot save to '{path}': there is no folder '{path.parent}'; make it first")
    scaling = {} if prior.scaling is None else prior.scaling.state()
    tensors = {f"params.{k}": v for k, v in prior.params.items()} | {f"scaling.{k}": v for k, v in scaling.items()}
    try:
        schema = json.dumps(describe_prior(prior))
    except TypeError as error:
        raise ValueError(
            f"inference {prior.inference.name!r} has settings {prior.inference.config}, which JSON cannot hold: "
            f"{error}; its config must be numbers, strings, None and lists of them"
        ) from error
    write_atomically(path, dump_tensors(tensors, {"format": _FORMAT, "schema": schema}))


def load_prior(path: str | Path, model: Model) -> LearnedPrior:
    """Reads a learned prior back for the model it was learned with.

    The model runs on made-up data, so that its sites, their distributions and their log-probabilities can be
    compared with the file's.

    Args:
        path: What `LearnedPrior.save` wrote.
        model: The same Pyro model.

    Returns:
        The learned prior on the CPU, with an empty history; it adapts and predicts as the saved one, bit for
        bit.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a learned prior, incomplete, or of a newer version; or the model differs
            from the file's. The message names the file, and each site and parameter that differs.
    """
    path = Path(path)
    schema, tensors = _read(path)
    try:
        return _rebuild(path, schema, tensors, model)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"'{path}' has a schema that cannot be read ({type(error).__name__}: {error}); save the prior again"
        ) from error


def describe_prior(prior: LearnedPrior) -> Schema:
    """What a file says of a learned prior besides its tensors, as JSON values."""
    from bmaml_ppl import __version__

    num_support = prior.num_support
    if isinstance(num_support, range):
        shots: Any = [num_support.start, num_support.stop, num_support.step]
    else:
        shots = num_support
    inference = {"name": prior.inference.name, "config": prior.inference.config}
    on_cpu = prior.to("cpu")
    return {
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        **_describe_model(prior.density),
        "params": {
            name: {
                "shape": list(value.shape),
                "constraint": _describe_constraint(prior.constraints.get(name)),
                "in_model": name in prior.density.prior,
            }
            for name, value in prior.params.items()
        },
        "template": _describe_template(prior.template),
        "fingerprint": fingerprint(on_cpu.density, on_cpu.params, prior.template),
        "inference": inference,
        "start": prior.start,
        "num_support": shots,
        "seed": prior.seed,
    }


def _describe_model(density: Density) -> Schema:
    return {
        "sites": {
            name: {
                "shape": list(site.shape),
                "support": _describe_constraint(site.support),
                "start": site.start,
                "stop": site.stop,
            }
            for name, site in density.sites.items()
        },
        "observed": {
            name: {"key": key, "plate_dim": density.plate_dims[name]} for name, key in density.observed.items()
        },
    }


def _describe_constraint(constraint: Constraint | None) -> str:
    """A constraint in words; tensors are named by their values, whatever their device, and large ones by range."""
    if constraint is None:
        return "Real()"
    fields = ", ".join(f"{key}={_describe_field(value)}" for key, value in sorted(vars(constraint).items()))
    return f"{type(constraint).__name__.lstrip('_')}({fields})"


def _describe_field(value: Any) -> str:
    if isinstance(value, Constraint):
        return _describe_constraint(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_describe_field, value))}]"
    if isinstance(value, int | float | Tensor):
        numbers = torch.as_tensor(value, dtype=torch.float64).detach().unique().tolist()
        shown = numbers if len(numbers) < 9 else [numbers[0], "...", numbers[-1]]
        return " ".join(x if isinstance(x, str) else f"{x:.6g}" for x in shown)
    return type(value).__name__


def _describe_template(template: Template) -> Schema:
    return {
        "data": {key: list(shape) for key, shape in template.data.items()},
        "constants": {key: list(shape) for key, shape in template.constants.items()},
        "outputs": list(template.outputs),
        "integers": {key: str(dtype).removeprefix("torch.") for key, dtype in template.integers.items()},
    }


def _read(path: Path) -> tuple[Schema, dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file '{path}'; LearnedPrior.save writes one")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"'{path}' is not a complete safetensors file ({error}); it was cut short or is of another kind. "
            "load_prior reads what LearnedPrior.save wrote"
        ) from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"'{path}' is a safetensors file but not a learned prior; it holds {sorted(tensors)[:5]}. "
            "load_prior reads what LearnedPrior.save wrote"
        )
    try:
        schema = json.loads(metadata["schema"])
        version = schema["format_version"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"'{path}' is a learned prior without a readable schema; save the prior again") from error
    if version > FORMAT_VERSION:
        raise ValueError(
            f"'{path}' has format version {version}, written by bmaml_ppl {schema.get('package_version')}; this "
            f"bmaml_ppl reads versions up to {FORMAT_VERSION}: upgrade it (pip install --upgrade bmaml-ppl)"
        )
    return schema, tensors


def _rebuild(path: Path, schema: Schema, tensors: Mapping[str, Tensor], model: Model) -> LearnedPrior:
    params = _select(tensors, "params.")
    _check_tensors(path, schema["params"], params)
    scaling = _select(tensors, "scaling.")
    template = _read_template(schema["template"])
    density = _match_model(path, schema, model, template, next(iter(params.values())))
    _match_fingerprint(path, schema.get("fingerprint", {}), fingerprint(density, params, template))
    shots = schema["num_support"]
    return LearnedPrior(
        density=replace(density, prior={name: params[name] for name in density.prior}),
        inference=_make_inference(path, schema["inference"], density),
        start=schema["start"],
        params=params,
        template=template,
        scaling=Scaling.from_state(scaling) if scaling else None,
        num_support=range(*shots) if isinstance(shots, list) else shots,
        seed=schema["seed"],
    )


def _select(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _check_tensors(path: Path, described: Schema, params: Mapping[str, Tensor]) -> None:
    wanted = {name: entry["shape"] for name, entry in described.items()}
    found = {name: list(value.shape) for name, value in params.items()}
    if wanted != found:
        differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise ValueError(f"'{path}' is damaged: its tensors and its schema disagree about {differing}; save again")


def _read_template(described: Schema) -> Template:
    return Template(
        data={key: tuple(shape) for key, shape in described["data"].items()},
        constants={key: tuple(shape) for key, shape in described["constants"].items()},
        outputs=tuple(described["outputs"]),
        integers={key: getattr(torch, dtype) for key, dtype in described["integers"].items()},
    )


def _match_model(path: Path, schema: Schema, model: Model, template: Template, like: Tensor) -> Density:
    """The model's density, once its sites and parameters are found to be those of the file."""
    try:
        first, second = (_look_at(model, template, like, seed) for seed in (0, 1))
    except Exception as error:  # whatever the model raises, the user must learn why it was run
        raise ValueError(
            f"the model could not be run on example data shaped as '{path}' has it ({type(error).__name__}: {error}); "
            "give load_prior the model that the prior was learned with"
        ) from error
    found, other = ({**_describe_model(density), "params": _describe_params(density)} for density in (first, second))
    differences = [
        *_differences("site", schema["sites"], found["sites"], other["sites"]),
        *_differences("observed site", dict.fromkeys(schema["observed"]), dict.fromkeys(found["observed"])),
        *_differences("param", _model_params(schema["params"]), found["params"]),
    ]
    if differences:
        raise ValueError(
            f"the model is not the one '{path}' was learned with: {'; '.join(differences)}. Give load_prior the model "
            "as it was, or learn the prior again with the new one"
        )
    observed = schema["observed"]
    return replace(
        first,
        observed={name: observed[name]["key"] for name in first.observed},
        plate_dims={name: observed[name]["plate_dim"] for name in first.observed},
    )


def _match_fingerprint(path: Path, wanted: Schema, found: Schema) -> None:
    """Refuses a model whose sites have other distributions, or other densities at the same point, than the file's."""
    changed = [f"{name!r} ({difference})" for name in wanted if (difference := _change(wanted[name], found.get(name)))]
    if found and changed:
        raise ValueError(
            f"the model is not the one '{path}' was learned with: sites {', '.join(changed)} changed. Give load_prior "
            "the model as it was, or learn the prior again with the new one"
        )


def _change(wanted: Schema, found: Schema | None) -> str:
    if found is None:
        return "missing"
    if wanted["distribution"] != found["distribution"]:
        return f"{found['distribution']} in the model, expected {wanted['distribution']}"
    before, now = wanted["log_prob"], found["log_prob"]
    if before is None or now is None:  # not finite: nothing to tell models apart by
        return ""
    same = math.isclose(before, now, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    return "" if same else f"log-probability {now:.6g} in the model at made-up data, expected {before:.6g}"


def _look_at(model: Model, template: Template, like: Tensor, seed: int) -> Density:
    shapes = {size for shape in [*template.data.values(), *template.constants.values()] for size in shape}
    rows = next(n for n in (7, 11, 13, 17, 19, 23, *range(24, 10_000)) if n not in shapes)
    example = template.varied_example(rows, like)
    # Counts and categories may be floating too, as those of a data frame are: outputs of zeros and ones are tried next.
    whole = {key: value.round() if key in template.outputs else value for key, value in example.items()}
    with pyro.validation_enabled(False), seeded(seed, torch.device("cpu")):
        try:
            return from_model(model, example, template.constants)
        except ValueError:
            return from_model(model, whole, template.constants)


def _describe_params(density: Density) -> Schema:
    return {
        name: {"shape": list(value.shape), "constraint": _describe_constraint(density.constraints.get(name))}
        for name, value in density.prior.items()
    }


def _model_params(described: Schema) -> Schema:
    return {
        name: {key: entry[key] for key in ("shape", "constraint")}
        for name, entry in described.items()
        if entry["in_model"]
    }


def _differences(kind: str, wanted: Schema, found: Schema, again: Schema | None = None) -> list[str]:
    """What differs, one sentence each; `again` is a second look, to tell a support that varies from a new one."""
    lines = [f"{kind} {name!r} is missing in the model" for name in wanted if name not in found]
    lines += [f"{kind} {name!r} is in the model but not in the file" for name in found if name not in wanted]
    for name in (name for name in wanted if name in found):
        for field, expected in (wanted[name] or {}).items():
            got = found[name][field]
            varies = again is not None and again[name][field] != got
            same = got.split("(")[0] == expected.split("(")[0] if varies else got == expected
            if not same and (field not in ("start", "stop") or not lines):
                lines.append(f"{kind} {name!r} has {field} {got} in the model, expected {expected}")
    return lines


def _make_inference(path: Path, described: Schema, density: Density) -> Inference:
    name, config = described["name"], described["config"]
    if name not in ALGORITHMS:
        raise ValueError(
            f"'{path}' was learned with inference {name!r}, which is not among {sorted(ALGORITHMS)}; register it in "
            "bmaml_ppl.inference.ALGORITHMS before loading"
        )
    try:
        return ALGORITHMS[name](**config, sites=density.sites)
    except TypeError as error:
        raise ValueError(f"'{path}' holds settings that inference {name!r} does not know: {error}") from error


def read_schema(path: str | Path) -> tuple[Schema, dict[str, Tensor]]:
    """Reads what a file says of a learned prior, without its model: the schema, and tensors by their stored names.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a learned prior, incomplete, or of a newer version.
    """
    return _read(Path(path))
