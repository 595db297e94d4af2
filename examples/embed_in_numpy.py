"""A trained layer inside a NumPy pipeline: where does a signal not go on as it used to?"""

import numpy as np

import nbrnn

rng = np.random.default_rng(0)
signal = np.sin(np.arange(4000) * 0.1) + 0.05 * rng.standard_normal(4000)
signal[3500:3505] += 0.7  # the fault to be found

model = nbrnn.Sequential(nbrnn.GRU(1, 16, seed=0), nbrnn.Linear(16, 1, seed=1))
trainer = nbrnn.Trainer(model, nbrnn.MSE(), nbrnn.Adam(0.01))
past = signal[:3000].reshape(30, 100).T[:, :, None].astype(np.float32)  # (T, B, I): 100 steps of 30 pieces
for _ in range(200):
    trainer.step(past[:-1], past[1:])

prediction, _ = model(signal[:-1, None].astype(np.float32))  # (T, I): one sequence, any length
error = np.abs(prediction[:, 0] - signal[1:])
print(f"usual error {np.median(error):.3f}; largest {error[100:].max():.3f} at {101 + error[100:].argmax()}")
