"""What the module forms of the losses share: they hold options for a function, and show them."""

from typing import Any

from torch import Tensor, nn

from hdc_kernels.checks import Backend, Reduction, check_choice, check_temperature
from hdc_kernels.distributed.ranks import ProcessGroups, check_process_group


class Loss(nn.Module):
    """Options as attributes, to be changed at any time; `options` is what they are when it is read.

    A `temperature` that is an `nn.Parameter` becomes one of the module's.
    """

    process_group: ProcessGroups | None

    def __init__(
        self,
        temperature: float | Tensor | None,
        *,
        reduction: Reduction,
        normalize: bool,
        backend: Backend,
        process_group: ProcessGroups | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, Reduction)
        check_choice("backend", backend, Backend)
        check_process_group(process_group)
        options = {
            **others,
            "reduction": reduction,
            "normalize": normalize,
            "backend": backend,
            "process_group": process_group,
        }
        if temperature is not None:  # of a loss that learns a scale instead
            check_temperature(temperature)
            if not isinstance(temperature, Tensor):
                temperature = float(temperature)  # to the compiler, NumPy's would be no number
            options = {"temperature": temperature, **options}
        for name, value in options.items():
            setattr(self, name, value)
        self._names = tuple(options)

    @property
    def options(self) -> dict[str, Any]:
        """For the function, by name."""
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        shown = self.options
        if self.process_group is None:
            del shown["process_group"]
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
