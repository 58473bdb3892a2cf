"""A program that runs meta-learning to be killed: for each line of JSON it reads, it forks a process that learns.

It prints the process's number, the steps as they are taken, and how the process ended. Forking spares each run the
seconds of importing torch; the program itself never computes a gradient, as autograd's threads do not survive a fork.
"""

import json
import os
import resource
import sys
import traceback
from tempfile import TemporaryDirectory
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from bmaml_ppl import Tasks, meta_learn
from bmaml_ppl.inference import svgd
from bmaml_ppl.loop import MetaStep


def level(x: Tensor, y: Tensor | None = None) -> None:
    """A normal level with normal noise."""
    mean = pyro.param("mean", torch.tensor(0.5))
    noise = pyro.param("noise", torch.tensor(1.0), constraint=dist.constraints.positive)
    a = pyro.sample("a", dist.Normal(mean, 1.0))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(a, noise), obs=y)


def level_tasks() -> Tasks:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(8, 1, generator=generator) + 0.5 * torch.randn(8, 5, generator=generator)
    return Tasks({"x": torch.zeros_like(y), "y": y}, outputs=("y",))


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def say_step(info: MetaStep) -> None:
    say(f"step {info.step}")


def learn(folder: str, every: int, num_steps: int, most_bytes: int | None = None) -> None:
    """Learns with checkpoints; no file may grow beyond `most_bytes`, as on a full disk."""
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    prior = meta_learn(
        level,
        level_tasks(),
        num_support=2,
        inference=svgd(num_particles=3, num_steps=1),
        num_steps=num_steps,
        batch_size=4,
        compile=False,
        progress=False,
        checkpoint_dir=folder,
        checkpoint_every=every,
        callbacks=[say_step],
    )
    say(f"loss {prior.history.loss}")


def answer(order: dict[str, Any]) -> None:
    process = os.fork()
    if process == 0:
        code = 1
        try:
            learn(**order)
            code = 0
        except BaseException:  # the fork must end here, whatever happens
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    say(f"process {process}")
    say(f"ended {os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        learn(folder, 1, 0)  # imports what is imported on first use
    say("ready")
    for line in sys.stdin:
        answer(json.loads(line))
