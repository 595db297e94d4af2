"""The recurrent layers by their names: `Recurrent` with a cell, and the options that are this cell's own.

All take the arguments of `Recurrent` behind `cell`; gates are in the order of the blocks of rows of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nbrnn.cells import (
    coupled_lstm,
    ctrnn,
    elman,
    gru,
    indrnn,
    jordan,
    layernorm_lstm,
    ligru,
    lstm,
    mingru,
    peephole_lstm,
    sru,
)
from nbrnn.layers.module import check_letters, check_positive
from nbrnn.layers.recurrent import Recurrent
from nbrnn.layers.sequences import Sequences


class LSTM(Recurrent):
    """Long short-term memory (Hochreiter and Schmidhuber 1997; forget gate: Gers et al. 2000).

    Parameters as in `Recurrent`, without `cell`. Gates are in the order i, f, g, o; the state is the tuple (h, c).
    """

    def __init__(self, input_size: int, hidden_size: int, *args: Any, **options: Any):
        super().__init__(lstm.LSTM, input_size, hidden_size, *args, **options)


class PeepholeLSTM(Recurrent):
    """LSTM whose gates see the cell state (Gers and Schmidhuber 2000).

    Parameters as in `Recurrent`, without `cell`. ``weight_ch_l0`` is (3, H), rows i, f, o.

    Parameters
    ----------
    peepholes : str
        The gates that have one: some of the letters of "ifo".
    """

    def __init__(self, input_size: int, hidden_size: int, *args: Any, peepholes: str = "ifo", **options: Any):
        self.peepholes = check_letters("peepholes", peepholes, "ifo")
        super().__init__(peephole_lstm.peephole_lstm(self.peepholes), input_size, hidden_size, *args, **options)

    def config(self) -> dict[str, Any]:
        return super().config() | {"peepholes": self.peepholes}


class CoupledLSTM(Recurrent):
    """LSTM with one gate in place of the input and the forget gate (CIFG; Greff et al. 2017).

    Parameters as in `Recurrent`, without `cell`. Gates are in the order f, g, o (or i, g, o).

    Parameters
    ----------
    couple : {"input", "forget"}
        Which gate follows from the other: i = 1 - f, or f = 1 - i.
    peepholes : str
        The gates that have one: some of the letters of "fo" (or "io").
    """

    def __init__(
        self, input_size: int, hidden_size: int, *args: Any, couple: str = "input", peepholes: str = "", **options: Any
    ):
        if couple not in ("input", "forget"):
            raise ValueError(f"couple: expected input or forget, got {couple!r}")
        self.couple = couple
        self.peepholes = check_letters("peepholes", peepholes, "fo" if couple == "input" else "io", least=0)
        cell = coupled_lstm.coupled_lstm(couple, self.peepholes)
        super().__init__(cell, input_size, hidden_size, *args, **options)

    def config(self) -> dict[str, Any]:
        return super().config() | {"couple": self.couple, "peepholes": self.peepholes}


class LayerNormLSTM(Recurrent):
    """LSTM with layer normalisation (Ba et al. 2016). Gates are in the order i, f, g, o; the state is (h, c).

    Parameters as in `Recurrent`, without `cell`. In place of biases there are ``weight_ln_ih_l0``, ``weight_ln_hh_l0``
    and ``bias_ln_l0``, (4, H), and ``weight_ln_c_l0`` and ``bias_ln_c_l0``, (H,).
    """

    def __init__(self, input_size: int, hidden_size: int, *args: Any, **options: Any):
        super().__init__(layernorm_lstm.LAYERNORM_LSTM, input_size, hidden_size, *args, **options)


class JordanRNN(Recurrent):
    """The Jordan network (1986): the output, whose layer lies inside the loop, is what is fed back.

    Parameters as in `Recurrent`, without `cell`. `proj_size` is the size P of the output (0: as many as hidden units)
    and `projection` its activation, tanh by default. The output layer is ``weight_hr_l0`` (P, H), ``bias_hr_l0``; the
    state is the output of the step before, (num_layers D, B, P).
    """

    def __init__(self, input_size: int, hidden_size: int, *args: Any, **options: Any):
        super().__init__(jordan.JORDAN, input_size, hidden_size, *args, **options)


class CTRNN(Recurrent):
    """Continuous-time recurrent network (Funahashi and Nakamura 1993, Beer 1995).

    Parameters as in `Recurrent`, without `cell`. ``log_tau_l0`` and ``theta_l0`` are (H,); the state is v, the output
    sigmoid(v + theta).

    Parameters
    ----------
    dt : float
        Length of a time step, in the unit of tau. A call may give others: ``layer(x, dt=array)``, one for each step
        (T,) or for each step and row (T, B).
    integrator : {"euler", "exponential"}
    """

    CELLS = {"euler": ctrnn.CTRNN, "exponential": ctrnn.CTRNN_EXPONENTIAL}  # noqa: RUF012

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *args: Any,
        dt: float = 0.1,
        integrator: str = "euler",
        **options: Any,
    ):
        if integrator not in self.CELLS:
            raise ValueError(f"integrator: expected euler or exponential, got {integrator!r}")
        self.dt, self.integrator = check_positive("dt", dt), integrator
        super().__init__(self.CELLS[integrator], input_size, hidden_size, *args, given={"dt": self.dt}, **options)

    def _check_given(self, given: Mapping[str, Any], form: Sequences) -> dict[str, np.ndarray]:
        found = super()._check_given(given, form)
        if given and found["dt"].min(initial=0.0) < 0:
            raise ValueError(f"dt: expected lengths of time steps, got {found['dt'].min()}")
        return found

    def config(self) -> dict[str, Any]:
        return super().config() | {"dt": self.dt, "integrator": self.integrator}


class GRU(Recurrent):
    """Gated recurrent unit (Cho et al. 2014).

    Parameters as in `Recurrent`, without `cell`. Gates are in the order r, z, n; the state is the array h.

    Parameters
    ----------
    reset_after : bool
        Whether the reset gate acts after the recurrent product, as in cuDNN and torch, or before it, as in the paper.
    """

    def __init__(self, input_size: int, hidden_size: int, *args: Any, reset_after: bool = True, **options: Any):
        if not isinstance(reset_after, bool):
            raise TypeError(f"reset_after: expected True or False, got {reset_after!r}")
        self.reset_after = reset_after
        super().__init__(gru.GRU if reset_after else gru.GRU_RESET_BEFORE, input_size, hidden_size, *args, **options)

    def config(self) -> dict[str, Any]:
        return super().config() | {"reset_after": self.reset_after}


class RNN(Recurrent):
    """The simple recurrent network (Elman 1990).

    Parameters as in `Recurrent`, without `cell`. The state is the array h.

    Parameters
    ----------
    nonlinearity : {"tanh", "relu"}
    """

    CELLS = {"tanh": elman.ELMAN_TANH, "relu": elman.ELMAN_RELU}  # noqa: RUF012

    def __init__(self, input_size: int, hidden_size: int, *args: Any, nonlinearity: str = "tanh", **options: Any):
        if nonlinearity not in self.CELLS:
            raise ValueError(f"nonlinearity: expected tanh or relu (for others: activations), got {nonlinearity!r}")
        super().__init__(self.CELLS[nonlinearity], input_size, hidden_size, *args, **options)
        self.nonlinearity = nonlinearity

    def config(self) -> dict[str, Any]:
        return super().config() | {"nonlinearity": self.nonlinearity}


class IndRNN(Recurrent):
    """Independently recurrent network (Li et al. 2018): no recurrent product, ``weight_u_l0`` (H,) in its place.

    Parameters as in `Recurrent`, without `cell`. The state is the array h.
    """

    def __init__(self, input_size: int, hidden_size: int, *args: Any, **options: Any):
        super().__init__(indrnn.INDRNN, input_size, hidden_size, *args, **options)


class MinGRU(Recurrent):
    """Minimal GRU (Feng et al. 2024): no recurrent product, linear in time. Gates are in the order z, n.

    Parameters as in `Recurrent`, without `cell`. The state is the array h.
    """

    def __init__(self, input_size: int, hidden_size: int, *args: Any, **options: Any):
        super().__init__(mingru.MINGRU, input_size, hidden_size, *args, **options)


class LiGRU(Recurrent):
    """Light GRU (Ravanelli et al. 2018). Gates are in the order z, n.

    Parameters as in `Recurrent`, without `cell`. The state is the array h.
    """

    def __init__(self, input_size: int, hidden_size: int, *args: Any, **options: Any):
        super().__init__(ligru.LIGRU, input_size, hidden_size, *args, **options)


class SRU(Recurrent):
    """Simple recurrent unit (Lei et al. 2018). Gates are in the order f, r, g, x; ``weight_c_l0`` is (2, H): v_f, v_r.

    Parameters as in `Recurrent`, without `cell`. The state is the tuple (h, c).
    """

    def __init__(self, input_size: int, hidden_size: int, *args: Any, **options: Any):
        super().__init__(sru.SRU, input_size, hidden_size, *args, **options)
