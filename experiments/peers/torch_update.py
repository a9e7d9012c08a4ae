"""One R2D2 update of the paper's network in PyTorch, timed: the peer of `rlx.bench what=learner`.

    python -m venv /tmp/torch && /tmp/torch/bin/pip install torch numpy
    /tmp/torch/bin/python experiments/peers/torch_update.py sequences=16 updates=3
    python -m rlx.bench what=learner setup=pong batch=16 torch=/tmp/torch/bin/python  # in turn

It needs nothing of rlx. Same rows (burn-in 40, unroll 80, 5 more), network, loss and optimiser;
frames are stacked and scaled as in rlx. It has less to do: no carry is reset inside a sequence (so
that PyTorch's own LSTM can be used), every row is valid, and no metric is measured.
"""

from __future__ import annotations

import sys
from time import perf_counter

import torch
from torch import nn

BURN_IN, UNROLL, N_STEP, ACTIONS, DISCOUNT, EPSILON = 40, 80, 5, 18, 0.997, 1e-3
LENGTH = BURN_IN + UNROLL + N_STEP


class Network(nn.Module):
    """Nature's convolutions, an optional dense layer, an LSTM of 512, dueling heads of 512."""

    def __init__(self, dense: int) -> None:
        super().__init__()
        self.torso = nn.Sequential(
            *(nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, 1), nn.ReLU(), nn.Flatten()),
            *((nn.Linear(3136, dense), nn.ReLU()) if dense else ()),
        )
        self.core = nn.LSTM((dense or 3136) + ACTIONS + 1, 512)
        self.value = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 1))
        self.advantage = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, ACTIONS))

    def forward(self, frames, extra, state):
        """uint8 [T, B, 4, 84, 84], f32 [T, B, A + 1] -> q f32 [T, B, A], state."""
        steps, lanes = frames.shape[:2]
        features = self.torso(frames.flatten(0, 1).float() / 255)
        x = torch.cat([features.view(steps, lanes, -1), extra], -1)
        h, state = self.core(x, state)
        advantage = self.advantage(h)
        return self.value(h) + advantage - advantage.mean(-1, keepdim=True), state


def rescale(x):
    return x.sign() * ((x.abs() + 1).sqrt() - 1) + EPSILON * x


def unrescale(x):
    root = (1 + 4 * EPSILON * (x.abs() + 1 + EPSILON)).sqrt()
    return x.sign() * (((root - 1) / (2 * EPSILON)) ** 2 - 1)


def loss_of(online, target, batch):
    frames, extra, action, reward, state = batch
    with torch.no_grad():
        target_q, _ = target(frames, extra, state)
        _, state = online(frames[:BURN_IN], extra[:BURN_IN], state)
    q, _ = online(frames[BURN_IN:], extra[BURN_IN:], state)
    with torch.no_grad():
        best = q.argmax(-1, keepdim=True)
        value = unrescale(target_q[BURN_IN:].gather(-1, best)[..., 0])
        result = DISCOUNT**N_STEP * value[N_STEP : N_STEP + UNROLL]
        for step in range(N_STEP):
            result = result + DISCOUNT**step * reward[BURN_IN + step : BURN_IN + step + UNROLL]
    taken = q[:UNROLL].gather(-1, action[BURN_IN : BURN_IN + UNROLL, :, None])[..., 0]
    return (0.5 * (rescale(result) - taken) ** 2).mean()


def made(sequences: int):
    """A batch of noise."""
    generator = torch.Generator().manual_seed(0)
    single = torch.randint(
        0, 256, (LENGTH + 3, sequences, 84, 84), dtype=torch.uint8, generator=generator
    )
    stacked = torch.stack([single[i : i + LENGTH] for i in range(4)], 2)
    action = torch.randint(0, ACTIONS, (LENGTH, sequences), generator=generator)
    extra = torch.cat([nn.functional.one_hot(action, ACTIONS).float(), action[..., None] * 0.1], -1)
    zeros = torch.zeros(1, sequences, 512)
    return stacked, extra, action, torch.ones(LENGTH, sequences), (zeros, zeros)


def main() -> None:
    given = dict(text.partition("=")[::2] for text in sys.argv[1:])
    sequences, updates = int(given.get("sequences", 16)), int(given.get("updates", 3))
    dense = int(given.get("dense", 0))
    online, target = Network(dense), Network(dense)
    target.load_state_dict(online.state_dict())
    adam = torch.optim.Adam(online.parameters(), lr=1e-4, eps=1e-3)
    batch = made(sequences)

    def update() -> None:
        adam.zero_grad()
        loss_of(online, target, batch).backward()
        nn.utils.clip_grad_norm_(online.parameters(), 80.0)
        adam.step()

    if "wait" in given:  # one update for each line that comes
        for _ in sys.stdin:
            update()
            print("done", flush=True)
        return
    update()
    seconds = []
    for _ in range(updates):
        began = perf_counter()
        update()
        seconds.append(perf_counter() - began)
    rows = sequences * UNROLL / sorted(seconds)[len(seconds) // 2]
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, dense={dense}: "
        f"{rows:,.0f} trained rows/s, {sequences} sequences an update"
    )


if __name__ == "__main__":
    main()
