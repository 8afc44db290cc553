"""The fit of every key head's far kernel on one layer: a grid over map, geometry, alpha and gamma, scored exactly."""

from dataclasses import fields
from typing import Any

import torch
from torch import nn

from hf_rfa.calibration.candidates import Candidate, CandidateSource
from hf_rfa.calibration.geometry import Geometry
from hf_rfa.calibration.head_errors import grams_of_heads, output_projection, squared_errors
from hf_rfa.calibration.parts import attention_parts, linear_settings
from hf_rfa.features.maps import optimal_proposal
from hf_rfa.ops.arguments import far_kernel
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.settings import AttentionSettings
from hf_rfa.runtime.adapter import RFAAdapter

GAMMAS = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)


class LayerFit:
    """Observer that accumulates, for one layer, the error of every candidate on every key head, in float64.

    The kernel is fitted on the text without the planted repeats at its end, which only count in the loss of a head:
    fitted on them too, heads that look things up would get a far average that harms them everywhere else.
    """

    def __init__(self, adapter: RFAAdapter, source: CandidateSource) -> None:
        self.adapter, self.runs = adapter, source.candidates()
        self.pure = adapter.config.window == 0
        # Without a window gamma cancels, and there has to be a far part.
        self.gammas = (1.0,) if self.pure else GAMMAS
        none = [] if self.pure else [(self.runs[0], 0.0)]
        self.candidates = none + [(run, gamma) for run in self.runs for gamma in self.gammas]
        self.plain_errors = torch.zeros(len(self.candidates), adapter.key_heads, dtype=torch.float64)
        self.errors = torch.zeros_like(self.plain_errors)
        self.totals = torch.zeros(3, dtype=torch.float64)  # squared output, tokens, far tokens
        self.planted = 0  # set by the caller: tokens at the end of each row that repeat earlier ones
        self.scaling = 1.0  # the layer's, set by its first call

    def __call__(
        self, adapter: RFAAdapter, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        layout: TokenLayout, settings: AttentionSettings, exact: torch.Tensor,
    ) -> None:  # fmt: skip
        heads, width = adapter.key_heads, exact.shape[1] // adapter.key_heads * exact.shape[3]
        projection = output_projection(module, heads * width, exact)
        grams = grams_of_heads(projection, heads, width, exact)
        joined = exact.float().transpose(1, 2).flatten(2)
        whole = joined if projection is None else joined @ projection.T
        far_tokens = max(0, query.shape[2] - 2 * adapter.config.window)
        tokens = query.shape[0] * query.shape[2]
        self.totals += torch.tensor([whole.double().square().sum().item(), tokens, far_tokens], dtype=torch.float64)
        self.scaling = settings.scaling
        target = exact.float().unflatten(1, (heads, -1))  # (B, Hk, G, N, M)
        row = 0 if self.pure else 1
        for number, run in enumerate(self.runs):
            call = self._call(query, key, value, layout, settings, run)
            near, far = attention_parts(call)
            squares = squared_errors(near, far, target, grams, self.gammas, call.sink_logits)
            if not self.pure and number == 0:
                self._add(0, squares[:1])
            self._add(row, squares if self.pure else squares[1:])
            row += len(self.gammas)

    def merge(self, reduce: Any) -> None:
        """Add the sums of other processes: `reduce(tensor)` gives the sum over all of them."""
        self.errors, self.plain_errors = reduce(self.errors), reduce(self.plain_errors)
        self.totals = reduce(self.totals)

    def choose(self) -> list[dict[str, Any]]:
        """Set the adapter to the best candidate of each key head; returns these with their losses and the window's."""
        losses = self.errors / self.totals[0]
        best = self.plain_errors.argmin(0)
        rows, chosen = [], [self.candidates[index] for index in best.tolist()]
        for head, (run, gamma) in enumerate(chosen):
            window = float("nan") if self.pure else losses[0, head].item()
            fit = {"feature_map": run.feature_map, "alpha": run.alpha, "gamma": gamma}
            rows.append({**fit, "loss": losses[best[head], head].item(), "window_loss": window})
        runs = [run for run, _ in chosen]
        geometry = {
            field.name: torch.stack([getattr(run.geometry, field.name)[head] for head, run in enumerate(runs)])
            for field in fields(Geometry)
        }
        self.adapter.set_kernel(
            [run.feature_map for run in runs],
            omega=torch.stack([run.omega[head] for head, run in enumerate(runs)]),
            alpha=torch.tensor([run.alpha for run in runs]),
            gamma=torch.tensor([gamma for _, gamma in chosen]),
            proposal=torch.stack([self._proposal(run)[head] for head, run in enumerate(runs)]),
            **geometry,
        )
        return rows

    def _call(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: TokenLayout,
        settings: AttentionSettings, run: Candidate,
    ) -> OperatorCall:  # fmt: skip
        query, key, value = (t.float() for t in (query, key, value))
        kernel = far_kernel(
            query, key.shape[1], omega=run.omega, feature_map=run.feature_map, alpha=run.alpha,
            proposal=self._proposal(run), **vars(run.geometry),
        )  # fmt: skip
        return OperatorCall.of(query, key, value, kernel, linear_settings(self.adapter, settings), layout)

    def _proposal(self, run: Candidate) -> torch.Tensor:
        """A (key_heads,) of the optimal positive features, for queries and keys times alpha."""
        geometry = run.geometry
        spread = geometry.query_radius.square() + geometry.key_radius.square()  # E|q+k|^2 where they are uncorrelated
        return optimal_proposal(spread * self.scaling * run.alpha**2, run.omega.shape[-1]).float()

    def _add(self, row: int, squares: torch.Tensor) -> None:
        """Add squared errors (candidates, B, Hk, N) from candidate number `row` on."""
        rows = slice(row, row + len(squares))
        self.errors[rows] += squares.sum((1, 3)).cpu()
        self.plain_errors[rows] += squares[..., : squares.shape[3] - self.planted].sum((1, 3)).cpu()
