"""fp16's loss scale: small gradients would vanish, so the loss is multiplied and the update divided.

scaler = LossScaler(cfg.fp16)  # scaler.scale is 1 where it is off
"""


class LossScaler:
    """Dynamic loss scale for fp16: halved when a gradient overflows, doubled after 2,000 good steps."""

    def __init__(self, enabled: bool):
        # 2^16, as torch's own begins: too large at first is found out in a few steps, too small never.
        self.scale, self.good, self.skipped, self.enabled = (2.0**16 if enabled else 1.0), 0, 0, enabled

    def state(self) -> dict:
        return {"scale": self.scale, "good": self.good, "skipped": self.skipped}

    def load(self, state: dict) -> None:
        self.scale, self.good, self.skipped = state["scale"], state["good"], state["skipped"]

    def update(self, finite: bool) -> None:
        # An overflow begins the count anew: growth waits for 2,000 good steps in a row.
        self.good, self.skipped = (self.good + 1, 0) if finite else (0, self.skipped + 1)
        if not finite:
            self.scale = max(self.scale / 2, 1.0)
        elif self.good % 2000 == 0:
            self.scale *= 2
        # From 2^16 down to 1 in 16 halvings: still overflowing means that the values themselves do.
        if self.skipped >= 25:
            raise ValueError("25 steps in a row overflowed in fp16; use bf16=true, or a lower learning_rate")
