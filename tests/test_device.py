"""Learning, adapting and predicting on the device of `--device`, and what "auto" chooses."""

import pytest
import torch

from bmaml_ppl import meta_learn
from bmaml_ppl.inference import svgd
from bmaml_ppl.objectives import query_nll
from tests.toys import level, level_tasks, line, line_tasks


def test_everything_stays_on_the_device(device: torch.device) -> None:
    tasks = level_tasks(12, 6)
    prior = meta_learn(level, tasks, num_support=3, num_steps=3, device=device, progress=False)
    assert {value.device.type for value in prior.params.values()} == {device.type}
    posterior = prior.adapt(tasks)
    assert posterior.particles.device.type == device.type
    drawn = posterior.predict(tasks, num_samples=8)["obs"]
    assert drawn.shape == (8, 12, 6)
    assert drawn.device.type == device.type


def test_the_device_does_not_change_what_is_learned(device: torch.device) -> None:
    """From free particles nothing is drawn in the loop, so that only rounding differs."""
    inference = svgd(num_particles=5, num_steps=2, init="free")
    learn = [
        meta_learn(
            line,
            line_tasks(12, 8),
            num_support=3,
            inference=inference,
            objective=query_nll("mean"),
            num_steps=3,
            device=where,
            progress=False,
        )
        for where in ("cpu", device)
    ]
    there = learn[1].params["particles"].cpu()
    torch.testing.assert_close(there, learn[0].params["particles"], rtol=1e-3, atol=1e-3)


@pytest.mark.cuda
def test_auto_takes_the_gpu() -> None:
    prior = meta_learn(level, level_tasks(12, 6), num_support=3, num_steps=1, progress=False)
    assert prior.device.type == "cuda"
