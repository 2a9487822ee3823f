#!/usr/bin/env bash
# torch 2.13.0 (CPU): inside torch.compile a branch on `super().name`, where the base's `name` is a property, is always
# taken, whatever the property says: the compiler tests the property object. Returned instead of tested, the same
# expression has the right value, so that printing it shows nothing.
# A good guess would have been a graph break, or an error with fullgraph=True.
# Seen: eager 0, compiled 1, for a property that is False; the value that is returned is False in both.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import torch

print("torch", torch.__version__)


class Base(torch.nn.Module):
    @property
    def on(self):
        return False


class Derived(Base):
    @property
    def on(self):
        return super().on

    def forward(self, x):
        return x + 1 if self.on else x


module, x = Derived(), torch.zeros(())
compiled = torch.compile(module, backend="eager", fullgraph=True)
eager, found = float(module(x)), float(compiled(x))
returned = torch.compile(lambda: module.on, backend="eager", fullgraph=True)()
print(f"eager {eager:.0f}, compiled {found:.0f}, returned {returned}")
assert (eager, found, returned) == (0.0, 1.0, False)
PY
