"""Saved priors: the round trip is exact, and what does not fit is named."""

import json
import os
import stat
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

import bmaml_ppl as bp
from bmaml_ppl.inference import map_estimate, svgd
from bmaml_ppl.storage import FORMAT_VERSION
from bmaml_ppl.types import Inference, Model

learn = partial(bp.meta_learn, num_support=2, num_steps=1, compile=False, progress=False)


def growth(
    x: Tensor,
    dose: Tensor,
    y: Tensor | None = None,
    *,
    names: tuple[str, ...] = ("coef", "noise"),
    size: int = 2,
    param: str = "mean",
    support: float = 1.0,
) -> None:
    mean = pyro.param(param, torch.zeros(size))
    scale = pyro.param("scale", torch.ones(size), constraint=dist.constraints.positive)
    coef = pyro.sample(names[0], dist.Normal(mean, scale).to_event(1))
    noise = pyro.sample(names[1], dist.Uniform(0.0, support))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(coef[0] + coef[1] * x + dose, noise + 0.1), obs=y)


network = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1))


def net(x: Tensor, y: Tensor | None = None) -> None:
    trunk = pyro.module("trunk", network)
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(trunk(x.unsqueeze(-1)).squeeze(-1) + level, 1.0), obs=y)


def counts(group: Tensor, x: Tensor | None = None, y: Tensor | None = None) -> None:
    """Integers index a table and are observed; one is outside the support of the observed proportions."""
    rate = pyro.sample("rate", dist.Gamma(pyro.param("shape", torch.ones(3)), 1.0).to_event(1))
    part = pyro.sample("part", dist.Uniform(0.0, rate[0]))
    with pyro.plate("data", group.shape[0]):
        pyro.sample("obs", dist.Poisson(rate[group] + part), obs=y)
        pyro.sample("share", dist.Beta(1 + part.expand(group.shape), 2.0), obs=x)


def copied(x: Tensor, y: Tensor | None = None) -> None:
    """What is observed equals every key when all of them are one."""
    level = pyro.sample("level", dist.Normal(pyro.param("mean", torch.zeros(())), 1.0))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(level + x, 1.0), obs=None if y is None else 1 * y)


def repeated(x: Tensor, y: Tensor | None = None) -> None:
    """A plate as long as the made-up data."""
    level = pyro.sample("level", dist.Normal(pyro.param("mean", torch.zeros(())), 1.0))
    with pyro.plate("data", x.shape[0], dim=-2), pyro.plate("repeats", 7, dim=-1):
        repeats = None if y is None else y.unsqueeze(-1).expand(-1, 7)
        pyro.sample("obs", dist.Normal(level + x.unsqueeze(-1), 1.0), obs=repeats)


def growth_tasks(dtype: torch.dtype = torch.float64) -> bp.Tasks:
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "x": torch.randn(n, generator=generator, dtype=dtype),
            "y": 7 + 3 * torch.randn(n, generator=generator, dtype=dtype),
            "dose": torch.tensor(0.1 * n, dtype=dtype),
        }
        for n in (4, 3, 5)
    ]
    return bp.Tasks.from_list(rows, outputs=["y"], constants=["dose"], names=["a", "b", "c"])


def net_tasks() -> bp.Tasks:
    tasks = growth_tasks(torch.float32)
    return bp.Tasks(tasks.data, {}, tasks.mask, tasks.names, tasks.outputs)


def count_tasks() -> bp.Tasks:
    x = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    return bp.Tasks(
        {"group": torch.arange(4).expand(3, 4) % 3, "x": x, "y": torch.ones(3, 4).long()}, outputs=("y", "x")
    )


CASES: dict[str, tuple[Model, Callable[[], bp.Tasks], Inference]] = {
    "prior start": (growth, lambda: growth_tasks().standardize(), svgd(num_particles=4, num_steps=3)),
    "learned steps": (
        growth,
        growth_tasks,
        svgd(num_particles=3, num_steps=2, init="free", learn_step_size="site", bandwidth=0.7),
    ),
    "network": (net, net_tasks, map_estimate(num_particles=2, num_steps=2, preconditioner="adaptive")),
    "derived output": (copied, lambda: net_tasks().standardize(), svgd(num_particles=3, num_steps=2)),
    "two plates": (repeated, net_tasks, svgd(num_particles=3, num_steps=2)),
    "integers": (counts, count_tasks, svgd(num_particles=3, num_steps=2)),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("storage") / "growth.safetensors"
    learn(growth, growth_tasks().standardize(), inference=svgd(num_particles=4, num_steps=3)).save(path)
    return path


def rewrite(path: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a saved prior with another schema."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    schema = json.loads(metadata["schema"])
    change(schema)
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, target, {**metadata, "schema": json.dumps(schema)})
    return target


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k].nan_to_num(-9.0), b[k].nan_to_num(-9.0)) for k in a)


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bit_identical(case: str, tmp_path: Path) -> None:
    model, make_tasks, inference = CASES[case]
    tasks = make_tasks()
    prior = learn(model, tasks, inference=inference, seed=11)
    prior.save(tmp_path / "prior.safetensors")
    before = torch.get_rng_state()
    loaded = bp.load_prior(tmp_path / "prior.safetensors", model)
    assert torch.equal(before, torch.get_rng_state())
    assert len(pyro.get_param_store()) == 0
    assert equal(prior.params, loaded.params)
    assert equal(loaded.density.prior, {k: loaded.params[k] for k in prior.density.prior})
    assert all(loaded.params[k].dtype == v.dtype for k, v in prior.params.items())
    assert (loaded.template, loaded.start, loaded.seed) == (prior.template, prior.start, prior.seed)
    assert loaded.density.plate_dims == prior.density.plate_dims
    assert loaded.density.observed == prior.density.observed
    assert loaded.inference.config == prior.inference.config
    assert loaded.history.loss == []
    ours, theirs = prior.adapt(tasks), loaded.adapt(tasks)
    assert torch.equal(ours.particles, theirs.particles)
    assert equal(ours.predict(num_samples=5), theirs.predict(num_samples=5))
    assert equal(prior.predict(tasks, num_samples=5), loaded.predict(tasks, num_samples=5))


@pytest.mark.parametrize("num_support", [2, range(1, 3)])
def test_shots_and_settings_are_kept(num_support: int | range, tmp_path: Path) -> None:
    prior = bp.meta_learn(growth, growth_tasks(), num_support=num_support, num_steps=0, progress=False, seed=5)
    prior.save(tmp_path / "prior.safetensors")
    loaded = bp.load_prior(tmp_path / "prior.safetensors", growth)
    assert (loaded.num_support, loaded.seed, loaded.scaling) == (num_support, 5, None)


def test_file_is_plain_tensors_and_json(saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        metadata, names = file.metadata(), set(file.keys())
    schema = json.loads(metadata["schema"])
    assert names == {f"params.{k}" for k in ("mean", "scale")} | {
        f"scaling.{part}.{k}" for part in ("loc", "scale") for k in ("x", "y")
    }
    assert schema["format_version"] == FORMAT_VERSION
    assert schema["package_version"] == bp.__version__
    assert schema["sites"]["noise"] == {
        "shape": [],
        "support": "Interval(lower_bound=0, upper_bound=1)",
        "start": 2,
        "stop": 3,
    }
    assert schema["params"]["scale"] == {"shape": [2], "constraint": "GreaterThan(lower_bound=0)", "in_model": True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ("coef", "sigma")}, "site 'noise' is missing in the model; site 'sigma' is in the model but not in"),
        ({"param": "centre"}, "param 'mean' is missing in the model; param 'centre' is in the model but not"),
        ({"size": 3}, r"site 'coef' has shape \[3\] in the model, expected \[2\].*param 'scale' has shape \[3\]"),
        ({"support": 2.0}, r"site 'noise' has support Interval\(lower_bound=0, upper_bound=2\) in the model, expected"),
    ],
    ids=["site", "param", "shape", "support"],
)
def test_another_model_is_refused_and_the_difference_named(saved: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"'{saved}' was learned with: {message}"):
        bp.load_prior(saved, partial(growth, **change))


def test_order_constraint_and_observed_sites_are_compared(saved: Path) -> None:
    def reordered(x: Tensor, dose: Tensor, y: Tensor | None = None) -> None:
        noise = pyro.sample("noise", dist.Uniform(0.0, 1.0))
        scale = pyro.param("scale", torch.ones(2))
        coef = pyro.sample("coef", dist.Normal(pyro.param("mean", torch.zeros(2)), scale).to_event(1))
        with pyro.plate("data", x.shape[0]):
            pyro.sample("height", dist.Normal(coef[0] + coef[1] * x + dose, noise + 0.1), obs=y)

    with pytest.raises(ValueError) as caught:
        bp.load_prior(saved, reordered)
    for part in (
        "site 'coef' has start 1 in the model, expected 0",
        "observed site 'obs' is missing in the model",
        "observed site 'height' is in the model but not in the file",
        "param 'scale' has constraint Real() in the model, expected GreaterThan(lower_bound=0)",
        "learn the prior again",
    ):
        assert part in str(caught.value)


def test_a_model_of_other_arguments_is_named(saved: Path) -> None:
    def other(time: Tensor, y: Tensor | None = None) -> None:
        raise AssertionError

    with pytest.raises(ValueError, match=f"could not be run on example data shaped as '{saved}' has it .*'dose', 'x'"):
        bp.load_prior(saved, other)


def test_a_truncated_file_is_named(saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    for length in (0, 4, len(content) // 2, len(content) - 1):
        path = tmp_path / f"cut{length}.safetensors"
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"'{path}' is not a complete safetensors file"):
            bp.load_prior(path, growth)


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=rf"'{path}' is a safetensors file but not a learned prior; .*\['weight'\]"):
        bp.load_prior(path, growth)
    text = tmp_path / "notes.txt"
    text.write_text("nothing of that kind, but long enough to look like a header")
    with pytest.raises(ValueError, match=f"'{text}' is not a complete safetensors file"):
        bp.load_prior(text, growth)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        bp.load_prior(tmp_path / "absent.safetensors", growth)


def test_a_newer_format_is_named(saved: Path, tmp_path: Path) -> None:
    newer = rewrite(saved, tmp_path / "new.safetensors", lambda s: s.update(format_version=99, package_version="9.0"))
    with pytest.raises(ValueError, match=f"'{newer}' has format version 99, written by bmaml_ppl 9.0; .*upgrade"):
        bp.load_prior(newer, growth)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["inference"].update(name="magic"), r"inference 'magic', which is not among \['.*svgd"),
        (lambda s: s["inference"]["config"].update(wings=2), "settings that inference 'svgd' does not know.*wings"),
        (lambda s: s["params"].pop("mean"), r"tensors and its schema disagree about \['mean'\]"),
        (lambda s: s.pop("template"), "has a schema that cannot be read .KeyError: 'template'"),
        (lambda s: s.pop("format_version"), "without a readable schema"),
    ],
    ids=["inference", "config", "params", "template", "version"],
)
def test_an_edited_schema_is_refused(
    saved: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = rewrite(saved, tmp_path / "edited.safetensors", change)
    with pytest.raises(ValueError, match=f"'{path}'.*{message}"):
        bp.load_prior(path, growth)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_writing_is_all_or_nothing(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    prior = bp.load_prior(saved, growth)
    path = tmp_path / "prior.safetensors"
    prior.save(path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        prior.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["prior.safetensors"]


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_file_has_the_users_usual_permissions(saved: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o666 & ~mask


def test_saving_into_no_folder_says_so(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder '.*absent'; make it first"):
        bp.load_prior(saved, growth).save(tmp_path / "absent" / "prior.safetensors")


def test_checkpoints_are_priors(tmp_path: Path) -> None:
    inference = map_estimate(num_steps=1)
    learned = bp.meta_learn(
        net, net_tasks(), num_support=2, num_steps=100, inference=inference, progress=False, compile=False,
        checkpoint_dir=tmp_path / "run",
    )  # fmt: skip
    assert equal(bp.load_prior(tmp_path / "run" / "prior.safetensors", net).params, learned.params)


def test_the_users_validation_setting_is_put_back(saved: Path) -> None:
    with pyro.validation_enabled(True):
        bp.load_prior(saved, growth)
        with pytest.raises(ValueError, match="to satisfy the constraint"):
            dist.Normal(0.0, -1.0)


def slope(
    x: Tensor, y: Tensor | None = None, *, power: int = 1, noise: Any = dist.Normal, latent: Any = dist.Normal
) -> None:
    mean = pyro.param("mean", torch.zeros(()))
    coef = pyro.sample("coef", latent(mean, 1.0))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", noise(coef * x**power, 0.5), obs=y)


def student(loc: Tensor, scale: float) -> Any:
    return dist.StudentT(5.0, loc, scale)


@pytest.fixture(scope="module")
def saved_slope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slope") / "slope.safetensors"
    learn(slope, net_tasks(), inference=svgd(num_particles=3, num_steps=2)).save(path)
    return path


@pytest.mark.parametrize(
    ("change", "named", "unnamed"),
    [
        ({"noise": student}, r"'obs' \(StudentT in the model, expected Normal\)", "'coef'"),
        ({"latent": student}, r"'coef' \(StudentT in the model, expected Normal\)", "'obs'"),
        ({"power": 2}, r"'obs' \(log-probability .* in the model at made-up data, expected", "'coef'"),
        ({"latent": lambda loc, scale: dist.Normal(loc, 2.0)}, r"'coef' \(log-probability", "'obs'"),
    ],
)
def test_another_model_of_the_same_sites_is_refused(
    saved_slope: Path, change: dict[str, Any], named: str, unnamed: str
) -> None:
    with pytest.raises(ValueError, match=named) as error:
        bp.load_prior(saved_slope, partial(slope, **change))
    assert unnamed not in str(error.value)


def test_the_same_model_is_accepted_and_a_file_without_a_fingerprint_too(saved_slope: Path, tmp_path: Path) -> None:
    bp.load_prior(saved_slope, slope)
    old = rewrite(saved_slope, tmp_path / "old.safetensors", lambda schema: schema.pop("fingerprint"))
    bp.load_prior(old, partial(slope, power=2))
