"""How much a run computes, in passes: one sample through one network of the teacher's size is 1, its backward is 2.

Seconds differ from machine to machine, passes do not. results/records.md compares runs by them. The arithmetic that the
counts follow, sample by sample: tests/test_passes.py.
"""

from collections.abc import Iterable

from torch import Tensor

from model import MMDiT


class Passes:
    """Counts the passes of these networks from now on. `count`: those of this process."""

    def __init__(self, models: Iterable[MMDiT]):
        self.count = 0
        for model in {id(model): model for model in models}.values():  # several roles may share one
            model.proj_out.register_forward_hook(self.add)  # runs once in each forward, with prefix or without

    def add(self, layer: object, inputs: tuple, output: Tensor) -> None:
        samples = len(output)
        self.count += samples
        if output.requires_grad:
            output.register_hook(lambda gradient: self.add_backward(samples))

    def add_backward(self, samples: int) -> None:
        self.count += 2 * samples
