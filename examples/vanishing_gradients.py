"""Why gradients vanish and explode on their way back through time, and what norm clipping is good for.

    python examples/vanishing_gradients.py
    python examples/vanishing_gradients.py --plot gradients.png        needs matplotlib

First the norm of dL/dh_t in untrained networks, for a loss at the end of 100 steps: with weights as they are drawn, and
with recurrent weights five times as large. Then the cliff in the loss of a network with a single unit, and gradient
descent that runs into it: figure 6 of R. Pascanu, T. Mikolov and Y. Bengio, On the Difficulty of Training Recurrent
Neural Networks (2013).
"""

import argparse

import numpy as np

import nbrnn

STEPS, INPUTS, HIDDEN = 100, 8, 32
SCALES = 1, 5
NETWORKS = {
    "RNN": (nbrnn.RNN, {}),
    "GRU": (nbrnn.GRU, {}),
    "LSTM": (nbrnn.LSTM, {}),
    "LSTM b_f=1": (nbrnn.LSTM, {"unit_forget_bias": True}),  # begins by remembering
}

# The one-unit network: x_0 = 0.5, x_t = w sigmoid(x_{t-1}) + b, L = (sigmoid(x_50) - 0.7)^2. To nbrnn it is an RNN with
# h_t = sigmoid(x_t), recurrent weight w and, as its input is always 1, input weight b.
CLIFF_STEPS, TARGET = 50, 0.7
H_0 = 1 / (1 + np.exp(-0.5))
W, B = np.linspace(3.8, 6.2, 160), np.linspace(-3.2, -1.6, 160)
START, LEARNING_RATE, UPDATES, LIMIT = (5.5, -2.6), 0.5, 200, 0.2


# ---------------------------------------------------------------- the gradient on its way back


def gradient_norms(layer, x):
    """|dL/dh_t| for t = T-1 down to 0, where L is the sum of the last outputs, scaled to |dL/dh_T| = 1."""
    # One call for each step, with the state carried: the gradient of its first state is what we are after.
    pullbacks, state = [], None
    for t in range(len(x)):
        y, state, pullback = layer.vjp(x[t : t + 1], state)
        pullbacks.append(pullback)
    dy, dstate, norms = np.full_like(y, 1 / np.sqrt(y.size)), None, []
    for pullback in reversed(pullbacks):
        _, dstate, _ = pullback(dy, dstate)
        dy = np.zeros_like(y)  # only the last output counts
        dh = dstate[0] if isinstance(dstate, tuple) else dstate  # of an LSTM's (h, c) we look at h
        norms.append(np.linalg.norm(dh))
    return norms


def all_norms():
    x = np.random.default_rng(0).standard_normal((STEPS, INPUTS))
    found = {}
    for scale in SCALES:
        for name, (kind, options) in NETWORKS.items():
            layer = kind(INPUTS, HIDDEN, dtype="float64", seed=0, **options)
            layer.params["weight_hh_l0"][...] *= scale
            found[name, scale] = gradient_norms(layer, x)
    return found


def print_norms(norms):
    print(f"norm of dL/dh, some steps before the end ({HIDDEN} hidden units, untrained)\n")
    for scale in SCALES:
        print("recurrent weights as drawn" if scale == 1 else f"\nrecurrent weights times {scale}")
        print("steps back" + "".join(f"{name:>12}" for name in NETWORKS))
        for back in (1, 5, 10, 20, 50, 100):
            print(f"{back:10}" + "".join(f"{norms[name, scale][back - 1]:12.1e}" for name in NETWORKS))


# ---------------------------------------------------------------- the cliff


def loss_surface():
    """The loss for each b (rows) and w (columns)."""
    w, b = (grid.ravel() for grid in np.meshgrid(W, B))
    # The units of an IndRNN do not see each other: one layer is a network for every point of the grid.
    layer = nbrnn.IndRNN(1, w.size, bias=False, activations="sigmoid", dtype="float64")
    layer.load_state_dict({"weight_ih_l0": b[:, None], "weight_u_l0": w})
    y, _ = layer(np.ones((CLIFF_STEPS, 1)), np.full((1, w.size), H_0))
    return (y[-1].reshape(len(B), len(W)) - TARGET) ** 2


def last_step_loss(y, target):
    dy = np.zeros_like(y)
    dy[-1] = 2 * (y[-1] - target)
    return float(y[-1, 0] - target) ** 2, dy


def descend(clip_norm):
    """Rows of w, b, the loss and the norm of its gradient: plain gradient descent."""
    layer = nbrnn.RNN(1, 1, bias=False, activations="sigmoid", dtype="float64")
    w, b = layer.params["weight_hh_l0"], layer.params["weight_ih_l0"]
    w[...], b[...] = START
    trainer = nbrnn.Trainer(layer, last_step_loss, nbrnn.SGD(LEARNING_RATE), clip_norm=clip_norm)
    path = []
    for _ in range(UPDATES):
        here = w.item(), b.item()
        loss, _ = trainer.step(np.ones((CLIFF_STEPS, 1)), TARGET, np.full((1, 1), H_0))
        path.append((*here, loss, np.linalg.norm(trainer.grads.flat)))
    return np.array(path)


def print_paths(paths):
    print("\ngradient descent at the cliff of a one-unit network\n")
    print(f"{'':18}{'largest |gradient|':>20}{'last w':>10}{'last b':>10}{'last loss':>12}")
    for name, path in paths.items():
        w, b, loss, _ = path[-1]
        step = path[:, 3].argmax()
        print(f"{name:18}{path[step, 3]:9.1f} at step {step + 1:2}{w:10.2f}{b:10.2f}{loss:12.4f}")


# ---------------------------------------------------------------- pictures


def new_figure():
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None
    return Figure(figsize=(12, 4.5), layout="constrained")


def plot(figure, norms, surface, paths):
    left, right = figure.subplots(1, 2)
    for color, name in enumerate(NETWORKS):
        for scale, style in zip(SCALES, ("-", "--")):
            label = name if scale == 1 else None
            left.semilogy(range(-1, -STEPS - 1, -1), norms[name, scale], style, color=f"C{color}", label=label)
    left.set(xlabel="t - T", ylabel="|dL/dh_t|", title=f"weights as drawn (full), times {SCALES[1]} (dashed)")
    left.legend()
    shades = right.pcolormesh(W, B, surface, cmap="Greys", rasterized=True)
    figure.colorbar(shades, label="loss")
    for (name, path), color in zip(paths.items(), ("tab:red", "tab:blue")):
        right.plot(path[:, 0], path[:, 1], ".-", color=color, label=name, linewidth=0.8)
    right.plot(*START, "k*", markersize=10, label="start")
    right.set(xlabel="w", ylabel="b", xlim=W[[0, -1]], ylim=B[[0, -1]], title="the cliff, and two ways to meet it")
    right.legend()


def main():
    parser = argparse.ArgumentParser(description="gradients that vanish, explode, and are clipped")
    parser.add_argument("--plot", metavar="FILE.png", help="draw a picture")
    options = parser.parse_args()
    figure = new_figure() if options.plot else None
    norms = all_norms()
    print_norms(norms)
    paths = {"without clipping": descend(None), f"norm at most {LIMIT}": descend(LIMIT)}
    print_paths(paths)
    if options.plot:
        plot(figure, norms, loss_surface(), paths)
        figure.savefig(options.plot)


if __name__ == "__main__":
    main()
