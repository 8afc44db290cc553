"""The fit of every key head's far kernel on one layer: a grid over map, geometry, alpha and gamma, scored in nats.

Let g be the gradient of log p(y) with respect to a head's output, y drawn from the model's own distribution (of an
output without probabilities: of its product with noise). A head whose output is off by delta then costs

    cost = E_y[(g . delta)^2] / 2, summed over the queries of all tokens ~ the KL divergence that it alone adds

(of other outputs E[(g . delta)^2], the squared error). Let a be the output of the near part alone, (f, z) the far sums
without gamma, d the near mass and s = gamma / (d + gamma z). The output is a + s (f - z a), so that

    g . delta = g . (a - exact) + s g . (f - z a)

and one evaluation of the far sums gives the cost for every gamma. Where gamma z is more than the kernel's limit
allows, gamma is the smaller one that makes it so much. Source: the quadratic approximation of the KL
divergence by the Fisher information, per head.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from hf_rfa.calibration.candidates import Candidate, CandidateSource
from hf_rfa.calibration.geometry import Geometry
from hf_rfa.calibration.layer_gradients import LayerInputs
from hf_rfa.calibration.parts import CallParts, linear_settings, parts_of
from hf_rfa.features.far_kernel import FarKernel
from hf_rfa.features.maps import optimal_proposal
from hf_rfa.ops.arguments import far_kernel
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.combine import smallest_denominator

GAMMAS = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)


@dataclass(frozen=True)
class HeadFit:
    """The far kernel of a key head, and what the head costs with it and with the window (and kept keys) alone."""

    feature_map: str
    alpha: float
    gamma: float
    cost: float
    window_cost: float


class LayerFit:
    """Adds up, for one layer, the costs of every candidate on every key head; takes the layer's gradients.

    The kernel is fitted on the text without the planted repeats at its end, which only count in the cost of a head:
    fitted on them too, heads that look things up would get a far average that harms them everywhere else.

    Attributes:
        planted: Set by the caller: tokens at the end of each row that repeat earlier ones.
    """

    def __init__(self, source: CandidateSource, every: int) -> None:
        adapter = source.adapter
        self.limit = source.far_limits()
        self.adapter, self.runs, self.every, self.scaling = adapter, source.candidates(), every, source.scaling
        self.pure = adapter.config.window == 0
        # Without a window gamma cancels, and there has to be a far part.
        self.gammas = (1.0,) if self.pure else GAMMAS
        none = [] if self.pure else [(self.runs[0], 0.0)]
        self.candidates = none + [(run, gamma) for run in self.runs for gamma in self.gammas]
        self.kernels = [self._kernel(run) for run in self.runs]
        self.plain_costs = torch.zeros(len(self.candidates), adapter.key_heads, dtype=torch.float64)
        self.costs = torch.zeros_like(self.plain_costs)
        self.queries = torch.zeros(2, dtype=torch.float64)  # of all tokens; of those that were evaluated
        self.planted = 0

    def __call__(self, inputs: LayerInputs, gradient: torch.Tensor) -> None:
        heads = self.adapter.key_heads
        call, exact = self._call(inputs), inputs.exact_output()
        gradient, exact = (x.float().unflatten(1, (heads, -1)) for x in (gradient, exact))
        plain = torch.ones(exact.shape[0], exact.shape[3], dtype=torch.bool, device=exact.device)
        plain[:, plain.shape[1] - self.planted :] = False
        for group, (of_group, part) in enumerate(call.groups()):
            parts = parts_of(part, self.every)
            costs = _GroupCosts(parts, part, gradient[:, of_group], exact[:, of_group], plain, self.gammas)
            if not group:
                tokens = plain.numel() if inputs.layout.token_mask is None else int(inputs.layout.token_mask.sum())
                self.queries += torch.tensor([tokens, costs.evaluated], dtype=torch.float64)
            row = 0
            if not self.pure:
                self._add(0, of_group, costs.alone())
                row = 1
            for kernel in self.kernels:
                own = kernel if len(of_group) == heads else kernel.select(of_group)
                self._add(row, of_group, costs.of(own))
                row += len(self.gammas)

    def merge(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Add the sums of other processes: `reduce(tensor)` gives the sum over all of them."""
        self.costs, self.plain_costs = reduce(self.costs), reduce(self.plain_costs)
        self.queries = reduce(self.queries)

    def choose(self, weight: float) -> list[HeadFit]:
        """Set the adapter to the best candidate of each key head; weight: what sums over all tokens are divided by."""
        costs = self.costs * (self.queries[0] / self.queries[1]) / weight
        best = self.plain_costs.argmin(0)
        found, chosen = [], [self.candidates[index] for index in best.tolist()]
        for head, (run, gamma) in enumerate(chosen):
            window = float("nan") if self.pure else costs[0, head].item()
            found.append(HeadFit(run.feature_map, run.alpha, gamma, costs[best[head], head].item(), window))
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
            far_limit=self.limit,
            proposal=torch.stack([self._proposal(run)[head] for head, run in enumerate(runs)]),
            **geometry,
        )
        return found

    def _kernel(self, run: Candidate) -> FarKernel:
        return far_kernel(
            run.omega, len(run.omega), omega=run.omega, feature_map=run.feature_map, alpha=run.alpha,
            proposal=self._proposal(run), far_limit=self.limit, **vars(run.geometry),
        )  # fmt: skip

    def _call(self, inputs: LayerInputs) -> OperatorCall:
        settings = linear_settings(self.adapter, inputs.settings)
        return OperatorCall.of(*inputs.wide(), self.kernels[0], settings, inputs.layout)

    def _proposal(self, run: Candidate) -> torch.Tensor:
        """A (key_heads,) of the optimal positive features, for queries and keys times alpha."""
        geometry = run.geometry
        spread = geometry.query_radius.square() + geometry.key_radius.square()  # E|q+k|^2 where they are uncorrelated
        return optimal_proposal(spread * self.scaling * run.alpha**2, run.omega.shape[-1]).float()

    def _add(self, row: int, heads: list[int], costs: torch.Tensor) -> None:
        """Add costs (2, candidates, heads) from candidate number `row` on."""
        both = costs.cpu()
        self.plain_costs[row : row + both.shape[1], heads] += both[0]
        self.costs[row : row + both.shape[1], heads] += both.sum(0)


class _GroupCosts:
    """Costs of candidates on the key heads of a call that keep the same number of keys.

    Each method gives (2, candidates, Hk): squares of g . delta added up over the queries of the plain and of the
    planted tokens.
    """

    def __init__(
        self, parts: CallParts, call: OperatorCall, gradient: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor,
        gammas: tuple[float, ...],
    ) -> None:  # fmt: skip
        batch, heads, groups = call.query.shape[:3]
        self._parts, self._shape, self._groups = parts, (batch, heads), groups
        self._gammas = torch.tensor(gammas, dtype=torch.float64, device=exact.device).view(-1, 1, 1, 1)
        given = parts.rows(gradient)
        counted = parts.rows(plain[:, None, None, :, None].expand(batch, heads, groups, -1, 1).float())
        counted = counted.unflatten(2, (groups, -1))[:, :, 0, :, 0]  # (A, n, R)
        self._plain, self._planted = counted * parts.asked, (1 - counted) * parts.asked
        self.evaluated = int((self._plain + self._planted).sum()) // heads
        constant = -(given * parts.rows(exact)).sum(-1)
        along = torch.zeros_like(constant)
        self._log_mass: torch.Tensor | None = None
        if parts.near is not None and parts.near_log is not None:
            log_mass, along = parts.near_log, (given * parts.near).sum(-1)
            if call.sink_logits is not None:
                logits = call.sink_logits.to(log_mass).repeat(batch, 1).unsqueeze(1)  # (A, 1, G)
                logits = logits.repeat_interleave(log_mass.shape[2] // groups, dim=2)
                log_mass = torch.logaddexp(parts.near_log, logits)
                along = along * (parts.near_log - log_mass).exp()
            self._log_mass = log_mass
        self._constant = (constant + along).double()  # g . (a - exact)
        self._given = torch.cat([given, -along.unsqueeze(-1)], dim=-1)  # its product with (f, z) is g . (f - z a)

    def alone(self) -> torch.Tensor:
        """Without a far part."""
        return self._sums(self._constant.unsqueeze(0))

    def of(self, kernel: FarKernel) -> torch.Tensor:
        """With a far kernel, for each gamma."""
        pushes, masses, logs = [], [], []
        for span, far, far_log in self._parts.far(kernel):
            pushes.append(torch.linalg.vecdot(self._given[:, span], far))
            masses.append(far[..., -1].clone())
            logs.append(far_log)
        push, mass, log = (torch.cat(x, dim=1) for x in (pushes, masses, logs))
        alive = mass > smallest_denominator(mass.dtype)
        push, mass = push.double(), mass.double()
        if self._log_mass is None:
            change = torch.where(alive, push / torch.where(alive, mass, 1.0), 0.0)
            return self._sums((self._constant + change).unsqueeze(0))
        ratio = (self._log_mass.double() - log).exp()  # the near mass in units of the far sums
        gammas, limit = self._gammas, kernel.log_limit()
        if limit is not None:
            most = limit.double().exp().repeat(self._shape[0]).view(-1, 1, 1) * ratio / torch.where(alive, mass, 1.0)
            gammas = torch.minimum(gammas, most)
        share = torch.where(alive, gammas / (ratio + gammas * mass), 0.0)
        return self._sums(torch.addcmul(self._constant, share, push))

    def _sums(self, products: torch.Tensor) -> torch.Tensor:
        """products (candidates, A, n, G * R): g . delta of each query head; those of a key head change together."""
        squares = products.unflatten(-1, (self._groups, -1)).sum(-2).square()
        both = [(squares * counted).sum((-2, -1)) for counted in (self._plain, self._planted)]
        return torch.stack(both).unflatten(-1, self._shape).sum(-2)
