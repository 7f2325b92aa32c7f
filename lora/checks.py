"""What several modules share: numbers, settings, parameters, precision."""

import math
from numbers import Integral, Real

import torch
from torch import nn
from torch._subclasses import FakeTensor


def check_number(name, value, least=-math.inf, kind=Real):
    """Return `value` as an int or a float if it is a finite `kind`, `least` or greater.

    Raises ValueError otherwise. Count with what is returned: NumPy's integers overflow.
    """
    try:
        if isinstance(value, kind) and not isinstance(value, bool):
            # converted first: NumPy would round the limit to inf for a float32
            number = int(value) if isinstance(value, Integral) else float(value)
            if math.isfinite(number) and number >= least:
                return number
    except OverflowError:  # a number beyond all floating-point numbers
        pass
    noun = "an integer" if kind is Integral else "a finite number"
    bound = "" if least == -math.inf else f" of at least {least}"
    raise ValueError(f"{name} must be {noun}{bound}, got {value!r}")


def check_settings(rank, alpha):
    """Raise ValueError unless `rank` is a positive integer and `alpha` is finite."""
    check_number("rank", rank, 1, Integral)
    check_number("alpha", alpha)


class Described(nn.Module):
    """A module whose state holds its `settings`, too: numbers that decide what it does.

    To load the state of one with other settings is an error, as it is for shapes: the
    same A and B with another alpha are another update. They are in `_extra_state`.
    """

    settings = ()

    def get_extra_state(self):
        values = [float(getattr(self, name)) for name in self.settings]
        return torch.tensor(values, dtype=torch.float64, device="cpu")

    def set_extra_state(self, saved):
        """Compared below, before anything is loaded."""

    def _load_from_state_dict(self, state, prefix, *args):
        here = self.get_extra_state()
        saved = state.get(f"{prefix}_extra_state", here)
        if torch.equal(saved, here.to(saved)):  # a state may be in half precision
            return super()._load_from_state_dict(state, prefix, *args)
        found, wanted = (dict(zip(self.settings, v.tolist())) for v in (saved, here))
        args[-1].append(f"{prefix[:-1]} was saved with {found}, and has {wanted} here")

    def extra_repr(self):
        return ", ".join(f"{name}={getattr(self, name)}" for name in self.settings)


@torch.inference_mode(False)
def parameter(tensor):
    """A parameter with the numbers of `tensor`, at least in float32, which can train.

    Also if it is made in inference mode, where a tensor of its own never could.
    """
    return nn.Parameter(wide(tensor.detach()).clone())


def wide(tensor):
    """The tensor in its own dtype, in half precision in float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def no_autocast(device):
    """A context in which products keep the dtype of their factors."""
    # On some devices, such as "meta", there is no autocast, not even to switch off.
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type if known else "cpu", enabled=False)


def finite(tensor):
    """Whether all numbers are finite, or there are none: on "meta", in fake tensors."""
    without = tensor.is_meta or isinstance(tensor, FakeTensor)
    return without or bool(tensor.isfinite().all())
