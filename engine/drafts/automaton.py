"""The suffix automaton of a text: the longest end of the text that occurred before, after every token.

A state stands for all runs of tokens that end at the same places of the text. Its link is the state of their longest
end that ends at more places. A text of n tokens has at most 2 n states, and a token costs constant time on average.
Most states have one way on, which is kept in arrays; only the others have a dict.

Source: Blumer et al., The smallest automaton recognizing the subwords of a text (1985).
"""

from array import array

NONE = -1
RENEWED = 32  # states of shorter ends whose last place a token renews: enough for texts that do not repeat one token


class Automaton:
    """The automaton of `tokens`, which grow by `append`.

    lengths  of the longest run of each state; `links` as above
    ends     a place at which the runs of a state ended, the last one but for RENEWED: the index of their last token
    """

    def __init__(self) -> None:
        self.tokens = array("q")
        self.lengths, self.links, self.ends = array("i", [0]), array("i", [NONE]), array("i", [NONE])
        self.first_tokens, self.first_states = array("q", [NONE]), array("i", [NONE])
        self.others: dict[int, dict[int, int]] = {}
        self.last = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def step(self, state: int, token: int) -> int:
        """The state after a token, or NONE."""
        if self.first_tokens[state] == token:
            return self.first_states[state]
        more = self.others.get(state)
        return NONE if more is None else more.get(token, NONE)

    def lead(self, state: int, token: int, target: int) -> None:
        """Let a token lead from `state` to `target`."""
        if self.first_tokens[state] in (NONE, token):
            self.first_tokens[state], self.first_states[state] = token, target
        else:
            self.others.setdefault(state, {})[token] = target

    def add(self, length: int, link: int, end: int) -> int:
        """A new state without ways on."""
        self.lengths.append(length)
        self.links.append(link)
        self.ends.append(end)
        self.first_tokens.append(NONE)
        self.first_states.append(NONE)
        return len(self.lengths) - 1

    def append(self, token: int) -> None:
        """Append a token, from 0 on, or a negative one that occurs once: a border between texts."""
        self.renew()
        self.tokens.append(token)
        new = self.add(self.lengths[self.last] + 1, 0, len(self.tokens) - 1)
        state, self.last = self.last, new
        while state != NONE and self.step(state, token) == NONE:
            self.lead(state, token, new)
            state = self.links[state]
        if state == NONE:
            return
        target = self.step(state, token)
        if self.lengths[state] + 1 == self.lengths[target]:
            self.links[new] = target
        else:
            self.links[new] = self.split(state, token, target)

    def split(self, state: int, token: int, target: int) -> int:
        """A new state for the runs of `target` that are one token longer than those of `state`, or shorter."""
        clone = self.add(self.lengths[state] + 1, self.links[target], self.ends[target])
        self.first_tokens[clone], self.first_states[clone] = self.first_tokens[target], self.first_states[target]
        if target in self.others:
            self.others[clone] = dict(self.others[target])
        self.links[target] = clone
        while state != NONE and self.step(state, token) == target:
            self.lead(state, token, clone)
            state = self.links[state]
        return clone

    def renew(self) -> None:
        """Note the end of the text as the last place of its own ends. It is late by a token, so that the end of the
        text finds an earlier place than itself."""
        state, place = self.links[self.last], len(self.tokens) - 1
        for _ in range(RENEWED):
            if state <= 0:
                return
            self.ends[state] = place
            state = self.links[state]

    def repeated(self) -> tuple[int, int]:
        """The longest end of the text that occurred before: its length, and the index after an earlier place of it."""
        state = self.links[self.last]
        return (0, 0) if state <= 0 else (self.lengths[state], self.ends[state] + 1)

    def follow(self, state: int, length: int, token: int) -> tuple[int, int]:
        """The state and length of the longest end of a text that occurs here, after one token more of that text.

        state, length  of the longest end before that token
        """
        while state > 0 and self.lengths[self.links[state]] >= length:
            state = self.links[state]  # the state was split since
        while state and self.step(state, token) == NONE:
            state = self.links[state]
            length = self.lengths[state]
        target = self.step(state, token)
        return (0, 0) if target == NONE else (target, length + 1)
