"""A calculator as an environment: the policy may ask it, `calc 7 + 8`, or answer, `answer 15`."""

from __future__ import annotations

import re

CALL = re.compile(r"calc (\d+) \+ (\d+)")
ANSWER = re.compile(r"answer (\d+)")


class Calculator:
    """1 for the right sum, 0 for another; 0.1 off for a turn that is neither call nor answer."""

    def reset(self, prompt, total, **columns):
        self.total = total

    def step(self, messages):
        said = messages[-1]["content"]
        if call := CALL.fullmatch(said):
            return str(int(call[1]) + int(call[2])), 0.0, False
        if answer := ANSWER.fullmatch(said):
            return "", float(int(answer[1]) == self.total), True
        return "", -0.1, True
