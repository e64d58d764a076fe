"""One-line defects that the tests must catch: `python tests/support/mutations.py` puts each into a copy of the package.

Each is (file under src/feedbackward, the line's old text, its new text, the test file that must fail). The copy
comes first on the path of a fresh process, which runs that test file until its first failure.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PACKAGE = TESTS.parent / "src" / "feedbackward"

TIME = "core/test_time.py"
CUTS, HOOKS, FUNCTIONS = "engine/cuts.py", "engine/hooks.py", "engine/autograd.py"
DENSE, LEARNER, PROBE, TRACE = (
    "operators/dense.py",
    "learner.py",
    "measure/probe.py",
    "model/trace.py",
)
LEFT = "core/test_left_as_it_was.py"
ROWS, CHANGED = "core/test_rows.py", "core/test_changed_models.py"
ORACLES, LAWS, STEPS = "rules/test_oracles.py", "core/test_laws.py", "core/test_steps.py"
FEEDBACK, MEASURES, CHAIN = "core/test_feedback.py", "core/test_probe.py", "core/test_chain.py"
DIRECT, JACOBIAN, LIFTS = (
    "rules/test_rules_direct.py",
    "rules/test_rules_jacobian.py",
    "rules/test_rules_ifa.py",
)
FORMS, SEEDED, COST = "operators/test_operators.py", "operators/test_seeded.py", "core/test_cost.py"
FIXED, MIXED, WHITE = "rules/test_rules_fixed.py", "core/test_mixed.py", "rules/test_whitening.py"
SIGNS, ALIGNED, PRODUCTS = (
    "rules/test_rules_signs.py",
    "rules/test_rules_alignment.py",
    "rules/test_rules_pfa.py",
)
PREDICTIVE = "rules/test_rules_predictive.py"
HIGHWAY = "rules/test_rules_highway.py"
HEADS = "rules/test_rules_local_heads.py"

MUTATIONS = (
    # cuts and broadcasts
    (FUNCTIONS, "signal = signal.reshape(shape)", "signal = signal.neg().reshape(shape)", ORACLES),
    (CUTS, "cut = h.detach()", "cut = h", ORACLES),
    (CUTS, "tape.versions[index] = h, cut, h._version", "tape.versions[index] = cut, cut, h._version", ORACLES),
    (FUNCTIONS, "return (d, None, None, *signals", "return (d * 0, None, None, *signals", ORACLES),
    (FUNCTIONS, "return (d, None, None, *signals, *grads)", "return (d, None, None, *signals[::-1], *grads)", ORACLES),
    (FUNCTIONS, "weights, message, activities[i]", "weights, message, activities[0]", ORACLES),
    (CUTS, "if h is not None and (h.requires_grad or place in self.upward):", "if h is not None:", ORACLES),
    (HOOKS, "call = tape.calls.get(self.name, 0)", "call = 0", ORACLES),
    (CUTS, "if source.shape[:lead].numel() < edge.rule.least_batch:", "if False:", ORACLES),
    (CUTS, "and h._version != version:", "and False:", STEPS),
    (FUNCTIONS, "return source.detach()  # not a view", "return source.view_as(source)  # not a view", STEPS),
    (CUTS, "if edge.operator.sized and not fits:", "if False:", STEPS),
    (HOOKS, "            self.tape = None\n\n    def _complete", "            pass\n\n    def _complete", LAWS),
    # chains
    ("operators/base.py", "return (grad.clone(),)", "return (-grad,)", CHAIN),
    ("graph.py", "return self.rule.learned and self.shares is None and", "return self.rule.learned and", CHAIN),
    (CUTS, "            if W.requires_grad\n", "", CHAIN),
    ("model/layers.py", "c.activity[1].requires_grad]", "c.activity[1].requires_grad][1:]", CHAIN),
    ("model/layers.py", "        end = max(call.end for call in trace.calls)", "        pass", CHAIN),
    ("operators/layer.py", "return d @ B", "return d @ B * 2", CHAIN),
    ("operators/layer.py", "folded, period - folded)", "folded, period - folded - 1)", CHAIN),
    ("operators/layer.py", "return position % size", "return position.clamp(0, size - 1)", CHAIN),
    # predictive coding
    ("rules/direct/dkp_pc.py", "z - self.gamma * n * slope", "z - self.gamma * slope", PREDICTIVE),
    ("rules/direct/dkp_pc.py", "/ (2 * n)", "/ n", PREDICTIVE),
    ("rules/direct/dkp_pc.py", "range(self.steps)", "range(1)", PREDICTIVE),
    ("rules/direct/dkp_pc.py", "gradients=True, weights=weights)", "gradients=True)", PREDICTIVE),
    ("engine/phase.py", "p - rate * p.grad", "p - p.grad", PREDICTIVE),
    ("engine/phase.py", "weight.grad = grad if weight.grad is None else weight.grad + grad", "weight.grad = grad", PREDICTIVE),
    # layer-wise chains
    ("operators/signed.py", "W.sign() * self.magnitudes", "W.sign().abs() * self.magnitudes", SIGNS),
    ("operators/signed.py", "return self.layer.bound / 3**0.5", "return self.layer.bound", SIGNS),
    ("operators/signed.py", "weights[0][1] += 1", "pass", SIGNS),
    ("rules/chain/sign_symmetry.py", '(form, "like_layer",', '(form, "kaiming_fan_out",', SIGNS),
    ("rules/chain/sign_symmetry.py", "widened * self.scale", "self.scale", SIGNS),
    (CUTS, "own = tuple(B.clone() for B in own)", "pass", SIGNS),
    ("optim.py", "W.mul_(torch.where(now > 0, norm / now, 1.0))", "pass", SIGNS),
    ("operators/base.py", "len(d) * places.clamp_min(1)", "len(d)", ALIGNED),
    ("rules/chain/weight_mirror.py", "self.decay * B - mirrored", "self.decay * B + mirrored", ALIGNED),
    # local losses
    ("rules/local/predsim.py", "(1 - self.similarity) * prediction", "prediction", HEADS),
    ("rules/local/predsim.py", "x = x.flatten(2).std(2)", "x = x.flatten(2).mean(2)", HEADS),
    ("rules/local/predsim.py", "x = x - x.mean(1, keepdim=True)", "pass", HEADS),
    ("rules/local/predsim.py", "(z - z.detach()) @ self.back.t()", "(z - z.detach()) @ self.decoder.weight.t()", HEADS),
    ("rules/local/predsim.py", "(wanted > 0)", "(wanted < 0)", HEADS),
    ("rules/local/lls.py", "F.normalize(self.reader(h), dim=1)", "self.reader(h)", HEADS),
    ("rules/local/lls.py", "scores / self.temperature", "scores", HEADS),
    ("rules/local/heads.py", "h.flatten(1, self.averaged).mean(1).flatten(1)", "h.flatten(1, self.averaged).sum(1).flatten(1)", HEADS),
    # skip paths
    ("engine/autograd.py", "before = ctx.held.pop() if ctx.held else torch.zeros_like(grad)", "before = grad", HIGHWAY),
    ("engine/autograd.py", "            held.clear()\n", "            pass\n", HIGHWAY),
    ("engine/autograd.py", "for _ in range(ctx.sweeps)", "for _ in range(1)", HIGHWAY),
    ("measure/cost.py", "passed + isinstance(child, DEFER)", "passed", HIGHWAY),
    ("model/branches.py", "min(through, fewest.get(other, through))", "through", HIGHWAY),
    ("model/branches.py", "for skip in (0, 1)", "for skip in (0,)", HIGHWAY),
    # relays
    ("operators/base.py", "len(d) * places.clamp_min(1)", "len(d)", "core/test_relays.py"),
    ("rules/direct/relayed_kp.py", "B - edge.operator.average", "B + edge.operator.average", "core/test_relays.py"),
    ("rules/direct/relayed_kp.py", "phase.edges if edge.shares is None], self.samples)", "phase.edges if edge.shares is None])", "core/test_relays.py"),
    ("rules/direct/relayed_kp.py", "self._operator, shared=True)", "self._operator)", "core/test_relays.py"),
    ("operators/layer.py", "share * self.mirrored(layer - B, noise)", "self.mirrored(layer, noise) - B", "core/test_mirrored.py"),
    ("operators/base.py", "if isinstance(part, Operator):\n            yield from within(part)", "pass", "core/test_mirrored.py"),
    ("operators/layer.py", "samples * places / (samples * places + inputs)", "1.0", "core/test_mirrored.py"),
    ("schedules/delayed.py", "max(0, -(-p // steps) - 1)", "p // steps", "core/test_staleness.py"),
    ("schedules/delayed.py", "alpha=len(self._queues[name])", "alpha=1", "core/test_predicted.py"),
    ("schedules/delayed.py", "        finally:\n            with torch.no_grad():", "        finally:\n            if False:", "core/test_predicted.py"),
    ("schedules/delayed.py", "self._before[name] = last", "pass", "core/test_staleness.py"),
    ("schedules/delayed.py", "sites[met] = 1 + max(fed)", "sites[met] = 1 + min(sources.values())", "core/test_staleness.py"),
    ("engine/phase.py", "return a if waiting else forward_ad.unpack_dual(a).primal", "return a", "core/test_relays.py"),
    ("topologies.py", "1 + max(0.0, math.log2(size / sizes[-1]))", "1.0", "core/test_relays.py"),
    ("topologies.py", "if len(run) > 1 and not run[-1].dominates", "if False", "core/test_relays.py"),
    ("model/autograd_graph.py", "if not passing[place]", "", "core/test_relays.py"),
    ("operators/layer.py", "side += (side + reach) % 2", "pass", "core/test_relays.py"),
    ("rules/chain/layer_alignment.py", "return 2 * seen.mean(seen.p, seen.r)", "return 2 * seen.mean(seen.q, seen.r)", ALIGNED),
    ("rules/chain/layer_alignment.py", "return total * (d.shape[1] / d.numel())", "return total / len(d)", ALIGNED),
    ("rules/chain/symmetric_alignment.py", "(self.self_product, self_product)", "(-self.self_product, self_product)", ALIGNED),
    ("operators/product.py", "self._weight(B.mT.to(grad.dtype) @", "self._weight(-B.mT.to(grad.dtype) @", PRODUCTS),
    ("operators/product.py", "bound = math.sqrt(3 / mid)", "bound = math.sqrt(3 / out)", PRODUCTS),
    ("rules/chain/pfa.py", "return chain(sites, product, shared=True)", "return chain(sites, product)", PRODUCTS),
    # schedules
    ("schedules/passes.py", "raise PassOverError", "pass", "core/test_schedules.py"),
    ("schedules/passes.py", "self.expected is None or", "True or", "core/test_schedules_repeated.py"),
    ("schedules/passes.py", "torch.autograd.graph.saved_tensors_hooks(_same, _same)", "torch.enable_grad()", "core/test_schedules.py"),
    ("schedules/replay.py", "    after.restore()", "    pass", "core/test_schedules.py"),
    ("schedules/replay.py", "    before.restore()", "    pass", "core/test_schedules.py"),
    ("schedules/replay.py", "[edge], [h], self.target, learn=False)\n            self.add(sent, d, more=True)", "[edge], [h], self.target, learn=False)\n            self.add(sent, -d, more=True)", "core/test_schedules.py"),
    ("schedules/replay.py", "total += torch.autograd.grad(sent, h, d)[0]", "total = torch.autograd.grad(sent, h, d)[0] * 2", "core/test_schedules.py"),
    ("schedules/preparation.py", "if above > largest:", "if False:", "core/test_schedules_held.py"),
    ("schedules/replay.py", "h.new_zeros(()).expand_as(h)", "torch.zeros_like(h)", "core/test_schedules_held.py"),
    ("schedules/segmentwise.py", "kept.random[index].restore()", "pass", "core/test_schedules.py"),
    ("schedules/segmentwise.py", "kept.beginning.restore()", "pass", "core/test_schedules.py"),
    ("schedules/segmentwise.py", "    after.restore()", "    pass", "core/test_schedules.py"),
    ("schedules/segmentwise.py", "    if missing:", "    if False:", "core/test_schedules.py"),
    ("engine/plan.py", "if not inner[i].isdisjoint(inner[j])", "if False", "core/test_schedules.py"),
    ("engine/target.py", ".to(source.dtype) * self.scale\n\n    def", ".to(source.dtype)\n\n    def", "rules/test_rules_local.py"),
    ("rules/direct/whitening.py", "axis = -1 if site.tokens else 1", "axis = 1", WHITE),
    ("rules/direct/whitening.py", "x = x - x.mean(0)", "x = x - x.mean()", WHITE),
    ("rules/direct/whitening.py", "ridge * torch.where(size > 0, size, 1.0)", "ridge", WHITE),
    ("rules/direct/whitening.py", "if h.dim() == 2 and not site.tokens", "if h.dim() == 2", WHITE),
    ("rules/direct/dkp.py", "if self.whiten:", "if self.whiten and self.center:", WHITE),
    ("rules/targets/dtp.py", "self.ladder(sites[:-1], as_source(sites[-1]), self.beta)", "self.ladder(sites, source, self.beta)", "rules/test_rules_targets.py"),
    ("operators/layer.py", "B * self._size(layer)", "B * layer.std()", "core/test_mirrored.py"),
    ("rules/direct/drtp.py", "return target / len(target)", "return target", "rules/test_rules_local.py"),
    ("engine/autograd.py", "torch.ones(shape, dtype=dtype", "torch.zeros(shape, dtype=dtype", "rules/test_rules_local.py"),
    # feedback graphs and what is a site
    ("graph.py", "int(site.every and not stepped)", "0", TIME),
    ("engine/cuts.py", "        return tensor.detach()\n", "        return tensor\n", TIME),
    ("engine/cuts.py", "        return h.detach()\n\n    def on_beside", "        return h\n\n    def on_beside", TIME),
    ("engine/autograd.py", "t = t.unsqueeze(1).expand", "t = t.unsqueeze(1).div(shape[1]).expand", TIME),
    ("model/repeated.py", "if any(first[1:]) or (any(last) and not last[-1])", "if any(last) and not last[-1]", TIME),
    ("unrolled.py", "tuple(part * there for part in new)", "new", TIME),
    ("unrolled.py", "torch.where(there, a, b)", "a", TIME),
    ("graph.py", "return 1 + kept", "return 1", ORACLES),
    ("graph.py", "and kept == site.tokens - calls", "", ORACLES),
    ("model/sites.py", "tensor is first or id(tensor) in found", "id(tensor) in found or len(found) > 1", ORACLES),
    ("model/sites.py", "if when >= self.source_end or tensor is self.source_tensor or", "if", ORACLES),
    (TRACE, "if t is tensor and v == version:", "if t is tensor:", STEPS),
    # rules
    ("rules/direct/dkp.py", "correlate(weights, d, h, self.center)", "correlate(weights, -d, h, self.center)", ORACLES),
    ("rules/direct/dkp.py", "correlate(weights, d, h, self.center)", "correlate(weights, d, h, False)", ORACLES),
    ("rules/direct/dkp.py", "Orthogonal(self.operator, self.strength)", "Orthogonal(self.operator)", "operators/test_orthogonal.py"),
    ("operators/orthogonal.py", "torch.where(total > 0, total, 1.0)", "total", "operators/test_orthogonal.py"),
    ("operators/orthogonal.py", "torch.mm(torch.mm(step, gram), step)", "torch.mm(step, gram)", "operators/test_orthogonal.py"),
    ("operators/orthogonal.py", "STEPS = 10", "STEPS = 9", "operators/test_orthogonal.py"),
    ("operators/orthogonal.py", "math.prod(source) <= LARGEST", "True", "operators/test_orthogonal.py"),
    ("operators/orthogonal.py", "math.sqrt(len(B)) / norm", "1 / norm", "operators/test_orthogonal.py"),
    ("model/state.py", 'vars(module)["forward"] = own', "pass", "core/test_state.py"),
    ("schedules/preparation.py", "tuple(name for name, p in attached.model.named_parameters() if p.requires_grad),", "(),", "core/test_schedules_held.py"),
    ("learner.py", "target, self._target = self._target, None", "target = self._target", "core/test_state.py"),
    ("rules/direct/sign_dfa.py", "d.sign() / len(d)", "d.sign()", ORACLES),
    ("rules/direct/sign_dfa.py", "    linear = False\n", "", DIRECT),
    ("rules/controls/flipped.py", "factor=-e.factor", "factor=e.factor", ORACLES),
    (FUNCTIONS, "if edge.factor != 1:", "if False:", ORACLES),
    ("rules/direct/ebd.py", "b.to(r.dtype) - r for", "b.to(r.dtype) + r for", DIRECT),
    ("rules/direct/fdfa.py", "moves / len(moves)", "moves", JACOBIAN),
    ("rules/direct/fdfa.py", "tuple(b - j for", "tuple(-j for", JACOBIAN),
    ("rules/direct/grape.py", ".data.div_(_norms(weights[0]))", ".data", JACOBIAN),
    ("rules/direct/grape.py", "* B - J) / len(B)", "* B - J)", JACOBIAN),
    ("engine/phase.py", "if tangent is None else tangent + noise[site]", "", JACOBIAN),
    ("engine/phase.py", "dtype=like.dtype, device=like.device, generator=generator)", "dtype=like.dtype)", JACOBIAN),
    ("operators/base.py", "self.send(weights, unit, site), center", "-self.send(weights, unit, site), center", JACOBIAN),
    ("engine/upward.py", "grad(h, below_layer, error,", "grad(h, below_layer, error * 0 + 1,", LIFTS),
    ("engine/upward.py", "return grad, grad\n", "return grad, -grad\n", LIFTS),
    ("engine/upward.py", "if inputs != {id(cut)}:", "if False:", LIFTS),
    ("rules/direct/dkp.py", "return 2 if self.center else 1", "return 1", ORACLES),
    ("rules/direct/dfa.py", "star(sites, source, self.operator)", "star(sites, source, Dense())", FEEDBACK),
    ("rules/controls/frozen.py", "return Graph(tuple(sites))", "return Graph()", LAWS),
    # targets and late gradients
    (CUTS, "and self.site_of(edges[0].source) is None", "", "rules/test_rules_targets.py"),
    (HOOKS, "reversed(kinds) if prepend else kinds", "kinds", "rules/test_rules_decoders.py"),
    ("rules/targets/dtp.py", "self.beta * len(d) * d", "self.beta * d", "rules/test_rules_targets.py"),
    ("rules/targets/decoding.py", "change=lambda site, h: noisy[site]", "change=lambda site, h: h + sigma * phase.noise(h)", "rules/test_rules_decoders.py"),
    ("rules/targets/ddtp.py", "decode(far) - decode(s) - rows", "decode(far) - rows", "rules/test_rules_decoders.py"),
    ("rules/targets/ddtp.py", "if site == pushed else h", "", "rules/test_rules_decoders.py"),
    ("rules/targets/sdtp.py", "p = activity.softmax(1)", "p = activity", "rules/test_rules_targets.py"),
    ("operators/decoder.py", "/ (self.beta * len(d))", "/ len(d)", "rules/test_rules_targets.py"),
    ("rules/targets/lra.py", "f(a) - f(a - n * d)", "f(a) - f(a - d)", "rules/test_rules_lra.py"),
    ("rules/targets/lra.py", "shares=layer_input.weight", "shares=None", "rules/test_rules_lra.py"),
    ("rules/targets/rec_lra.py", "torch.where(h > 0, torch.minimum(d, h), d)", "d", "rules/test_rules_lra.py"),
    ("model/layers.py", "in ELEMENTWISE and activation is None", "in ELEMENTWISE", "rules/test_rules_lra.py"),
    ("schedules/dsp.py", "blocks - 1 - i * blocks // parts", "i * blocks // parts", "core/test_staleness.py"),
    ("schedules/delayed.py", "grad.clone() if grad is not None and grad._is_view() else grad", "grad", "core/test_staleness.py"),
    ("schedules/delayed.py", "deque([None] * ages[name])", "deque([None] * max(delays))", "core/test_staleness.py"),
    ("schedules/delayed.py", "own = found.get(f\"model.{edge.shares}\", {delays[i]: edge.site.name})", "own = {delays[i]: edge.site.name}", "core/test_staleness.py"),
    ("engine/plan.py", "Segment(site.name, tuple(name for name in behind if name not in seen))", "Segment(site.name, tuple(behind))", "core/test_staleness.py"),
    # fixed direct feedback, modules and mixtures
    ("rules/direct/shared_dfa.py", "Shared(scale=self.scale)", "Shared(scale=2 * self.scale)", FIXED),
    ("rules/direct/sparse_dfa.py", "Sparse(self.nonzeros, self.scale)", "Sparse(1, self.scale)", FIXED),
    ("rules/direct/binary_dfa.py", "Binary(self.scale)", "Binary(self.scale / 2)", FIXED),
    ("rules/direct/pdfa.py", 'Seeded(self.scale, "binary")', "Seeded(self.scale)", FIXED),
    ("rules/mixed/cdfa.py", "sites[vectors[0] :]", "sites", FIXED),
    ("rules/mixed/cdfa.py", "sites[vectors[0] :]", "sites[vectors[-1] :]", FIXED),
    ("rules/mixed/han2020.py", "dilation=skipped", "dilation=1", "rules/test_rules_han2020.py"),
    ("rules/mixed/han2020.py", "stage[max(end - most, 0) : end]", "stage[end - 1 : end]", "rules/test_rules_han2020.py"),
    ("topologies.py", "inner = group if output is source else group[:-1]", "inner = group", "rules/test_rules_han2020.py"),
    ("operators/layer_kernel.py", "padding = 2 * f.padding[i] +", "padding = f.padding[i] +", FIXED),
    ("operators/layer_kernel.py", "groups=1)", "groups=self.form.groups)", FIXED),
    ("operators/layer_kernel.py", "reversed(ends) if self.form.transposed else ends", "ends", FIXED),
    ("engine/checks.py", "any(point.kind == \"input\" for point in source.points)", "False", FIXED),
    ("graph.py", "e if e.rule is not None else replace(e, rule=rule) for e in self.edges", "replace(e, rule=rule) for e in self.edges", MIXED),
    ("engine/attached.py", "return any(rule.needs == \"target\" for rule in self.rules)", "return all(rule.needs == \"target\" for rule in self.rules)", MIXED),
    ("learner.py", "phase if alone else phase.part(own)", "phase", MIXED),
    ("rules/mixed/mixed.py", "cut.update(part.sites)", "cut.update(sites)", MIXED),
    # what a step costs
    ("measure/counting.py", "self.tensor = tensor.detach()", "self.tensor = tensor", COST),
    ("measure/counting.py", "if moving and packet is not aten.ones_like:", "if moving:", COST),
    ("measure/counting.py", '"input_gradients" if product.moving else "weight_gradients"', '"weight_gradients"', COST),
    ("measure/counting.py", "if key not in self._known:", "if True:", COST),
    ("measure/counting.py", "if self._uses[key] == 1:", "if True:", COST),
    ("measure/cost.py", "made if made or sent else declared", "made or declared", COST),
    ("measure/cost.py", "made if made or sent else declared", "made", COST),
    ("measure/cost.py", "joint.total(\"feedback\") - seen", "joint.total(\"feedback\") * 0", COST),
    ("measure/cost.py", "(child, int(i > 0))", "(child, 0)", COST),
    ("measure/cost.py", "int(product and not products.made_of_weights(child))", "int(product)", COST),
    ("measure/cost.py", "max(depth.get(there, 0), depth[node, passed] + more)", "depth[node, passed] + more", COST),
    ("measure/cost.py", "if segment.parameters}", "}", COST),
    # dense feedback
    (DENSE, "return d.t() @ h", "return (h.t() @ d).reshape(d.shape[1], -1)", ORACLES),
    (DENSE, "return d.t() @ h", "return d.t() @ h / len(h)", LAWS),
    (DENSE, "d = d - d.mean(0)", "d = d - d.sum(0)", ORACLES),
    (DENSE, "(rows(d) @ rows(B)).reshape", "(rows(d) @ rows(B.transpose(1, -1))).reshape", ORACLES),
    (DENSE, "last = (*site[1:], site[0])", "last = (site[0], *site[1:])", ORACLES),
    (DENSE, "return (grad.movedim(-1, 1) if moved else grad,)", "return (grad,)", ORACLES),
    (DENSE, "B.uniform_(-math.sqrt(6) / root, math.sqrt(6)", "B.uniform_(-math.sqrt(3) / root, math.sqrt(3)", FEEDBACK),
    (DENSE, "B.normal_(generator=generator).div_(root)", "B.normal_(generator=generator)", FEEDBACK),
    (DENSE, "B.normal_(generator=generator)", "B.normal_()", FEEDBACK),
    (DENSE, "return (B.mul_(self.scale),)", "return (B,)", FEEDBACK),
    # other forms of feedback
    ("operators/shared.py", "@ B[:, : math.prod(site)]", "@ B[:, -math.prod(site) :]", FORMS),
    ("operators/shared.py", "(0, weights[0].shape[1] - grad.shape[1])", "(weights[0].shape[1] - grad.shape[1], 0)", FORMS),
    ("operators/sparse.py", "math.sqrt(n / math.sqrt(C * s))", "math.sqrt(n / math.sqrt(C / s))", FORMS),
    ("operators/sparse.py", "decks.roll(-k, 1)", "decks.roll(0, 1)", FORMS),
    ("operators/sparse.py", "(i + turns) % max(r, 1)", "i % max(r, 1)", FORMS),
    ("operators/sparse.py", "(k * r + (i", "((i", FORMS),
    ("operators/sparse.py", "circle = torch.randperm(C, generator=generator)", "circle = torch.arange(C)", FORMS),
    ("operators/sparse.py", "* h.mean(0)", "* h.sum(0)", FORMS),
    ("operators/sparse.py", "if units <= 256", "if units <= 257", FORMS),
    ("operators/binary.py", ">> places) & 1", ">> (7 - places)) & 1", FORMS),
    ("operators/binary.py", "math.sqrt(2 / math.prod(site))", "math.sqrt(2) / math.prod(site)", FORMS),
    ("operators/low_rank.py", "rows(V).t(), center)", "rows(V).t(), False)", FORMS),
    ("operators/low_rank.py", "bound = math.sqrt(3 / r)", "bound = math.sqrt(1 / r)", FORMS),
    ("operators/low_rank.py", "if self.rank > min(C, n):", "if self.rank > C:", FORMS),
    ("operators/pooled.py", "shape, math.prod(site), generator", "shape, math.prod(shape[1:]), generator", FORMS),
    ("operators/pooled.py", "- 1 - axis), 0, after)", "- 1 - axis), after, 0)", FORMS),
    ("operators/pooled.py", "B * self._sums(", "B + 0 * self._sums(", FORMS),
    ("operators/per_shape.py", "if len(site) > 1 else", "if len(site) > 2 else", FORMS),
    ("operators/kernel.py", "1, like).flip(0))", "1, like))", FORMS),
    ("operators/kernel.py", "h.mean([0, *range(2, h.dim())], keepdim=True)", "h.mean([0], keepdim=True)", FORMS),
    ("operators/kernel.py", "padding = self.dilation * (self.size // 2)", "padding = self.size // 2", FORMS),
    ("operators/kernel.py", "if any(length % places for", "if any(length < places for", FORMS),
    ("operators/seeded.py", "* 2 + (1 - 2**24)", "* 2 - 2**24", FORMS),
    ("operators/seeded.py", "(2 if binary else 6)", "6", FORMS),
    ("operators/seeded.py", "words(self.seed, start, stop, device)", "words(self.seed, 0, stop - start, device)", SEEDED),
    ("operators/seeded.py", 'object.__setattr__(fitted, "seed", seed)', 'object.__setattr__(self, "seed", seed)', SEEDED),
    ("operators/counter.py", "^ (index >> 32) ^ stream", "^ stream", SEEDED),
    ("operators/counter.py", "stream = _mix(_mix(key & _MASK) ^ (key >> 32))", "stream = (key & _MASK) ^ (key >> 32)", SEEDED),
    # the learner
    ("engine/weights.py", '":".join(map(str, parts))', '":".join(map(str, parts[1:]))', FEEDBACK),
    ("engine/weights.py", '":".join(map(str, parts))', '":".join(map(str, parts[:1]))', FEEDBACK),
    ("engine/weights.py", "hashlib.sha256(text.encode())", "hashlib.sha256(str(hash(text)).encode())", FEEDBACK),
    (LEARNER, "before, self._exact = self._exact, True", "before, self._exact = self._exact, False", LAWS),
    (LEARNER, "handle.remove()", "pass", LAWS),
    # other tools
    ("engine/attached.py", "hooks.move_to_end(handle.id)", "pass", "core/test_sharded.py"),
    ("engine/in_place.py", "average_in_backward(self.attached.feedback.parameters())", "pass", "core/test_sharded.py"),
    ("engine/outside.py", "p.grad = grad if p.grad is None else grad + p.grad", "p.grad = grad", "core/test_sharded.py"),
    ("engine/outside.py", "    if training:", "    if False:", "core/test_recorded.py"),
    ("engine/attached.py", "if self.without_phase == PASSES_WITHOUT_PHASE", "if False", "core/test_recorded.py"),
    ("engine/weights.py", "holder.register_buffer(name, weight)", "holder.register_buffer(name, weight, persistent=False)", LAWS),
    ("engine/plan.py", "return below(node)[:1] if", "return below(node) if", LAWS),
    # passes that must leave no trace
    ("model/attributes.py", "tensor.data.copy_(values)", "pass", LAWS),
    ("model/attributes.py", "tensor.data.copy_(values)", "tensor.copy_(values)", STEPS),
    ("model/state.py", "random.setstate(self.cpu[0])", "pass", MEASURES),
    ("model/state.py", "m.training = mode", "pass", LEFT),
    ("model/state.py", "p.data.copy_(values)", "pass", LEFT),
    ("model/attributes.py", "del space[key]", "pass", LEFT),
    ("model/attributes.py", "                _refill(container, items)", "                pass", LEFT),
    ("model/example.py", "leaf if leaf.requires_grad else leaf.clone()", "leaf", LEFT),
    ("model/example.py", "copy.deepcopy(leaf, known)", "leaf", LEFT),
    ("engine/hooks.py", "else _other_place(module, place)", 'else ""', "core/test_arguments.py"),
    # rows, and models that are changed after attach
    ("engine/rows.py", "if _coded(plain, coded, self.code, 0):", "if True:", ROWS),
    ("engine/rows.py", "if row is not None:", "if False:", ROWS),
    ("engine/rows.py", "if _coded(plain, along, self.code, dim=0):", "if False:", ROWS),
    ("engine/rows.py", "if 2 * far > len(ahead) or", "if far or", ROWS),
    ("engine/rows.py", "or min(ahead)[0] > _ALWAYS", "", ROWS),
    ("engine/rows.py", "if len(end) < 2 or end.is_meta:", "if False:", ROWS),
    ("engine/attached.py", "self.rows.see_again(self.model, inputs)", "pass", ROWS),
    ("model/trace.py", "as_in_training(model, batch_norms=False)", "as_in_training(model)", ROWS),
    ("engine/structure.py", "_lost(module, new) or self._carries(module, new)", "_lost(module, new)", CHANGED),
    ("engine/structure.py", "if parts or self._lifted or _lost(module, new) or", "if", CHANGED),
    ("engine/structure.py", "and self._count() == self._tensors", "", CHANGED),
    ("engine/plan.py", "heirs.get(n, set()) & there", "False", CHANGED),
    ("engine/cuts.py", "self._check_met(local.site, tape.h[place], tape.versions[place])", "pass", "rules/test_rules_local.py"),
    # the probe
    (PROBE, "install(self.model, prepend=True)", "install(self.model)", MEASURES),
    (PROBE, "batch, params, exact=True)", "batch, params, exact=False)", MEASURES),
    (PROBE, "rows[i].append(_rows(g).double().mean(0))", "rows[i].append(_rows(g).double()[0])", MEASURES),
    (PROBE, "rule.norm().item() / norm if norm", "norm / rule.norm().item() if norm", MEASURES),
    (PROBE, "rule.sign() == bp.sign()", "rule.sign() != bp.sign()", MEASURES),
    (PROBE, ".double() @ B.t()", ".double() @ -B.t()", MEASURES),
    (HOOKS, "tensor.clone()", "tensor", MEASURES),
)  # fmt: skip


def _test(folder: str, test: str) -> None:
    """In a process of its own: run a test file against the package in `folder`; exit as pytest does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.path.insert(0, folder)
    import pytest
    import torch

    torch.set_num_threads(1)
    options = ["-x", "--tb=no", "-k", "not resnet20"]
    for plugin in (
        "cacheprovider",
        "anyio",
        "unraisableexception",
        "threadexception",
    ):  # they cost more than the tests
        options += ["-p", f"no:{plugin}"]
    code = pytest.main([*options, str(TESTS / test)])
    import feedbackward

    if not str(feedbackward.__file__).startswith(folder):
        code = 99  # another copy was tested
    os._exit(int(code))


def place(text: str, old: str) -> re.Match[str]:
    """Where the old text stands, however the formatter broke its line. Raises ValueError unless it is there once."""
    gap = r"(?:\s|#[^\n]*\n)*"
    tokens = [re.escape(token) for token in re.findall(r"\w+|[^\w\s]", old)]
    pattern = gap.join(f",?{gap}{token}" if token == r"\)" else token for token in tokens)
    found = list(re.finditer(pattern, text))
    if len(found) != 1:
        raise ValueError(f"{old!r} stands {len(found)} times in the file")
    return found[0]


def outcome(test: str, mutation: tuple[str, str, str] | None = None) -> int:
    """pytest's exit code for one test file against a copy of the package, with the mutation if there is one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "pytest", "numpy"])
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "feedbackward"
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("experiment"))
        if mutation is not None:
            file, old, new = mutation
            text = (copy / file).read_text()
            start, stop = place(text, old).span()
            (copy / file).write_text(text[:start] + new.lstrip() + text[stop:])
        process = context.Process(target=_test, args=(folder, test))
        process.start()
        process.join(240)
        if process.exitcode is None:
            process.kill()
            process.join()
        return process.exitcode if process.exitcode is not None else -1


def main() -> int:
    """Report every mutation that its test file does not catch (anything but exit code 1)."""
    start, survivors = time.perf_counter(), 0
    for test in sorted({mutation[3] for mutation in MUTATIONS}):
        if outcome(test) != 0:
            print(f"{test} fails without any mutation")
            return 2
    for file, old, new, test in MUTATIONS:
        code = outcome(test, (file, old, new))
        if code != 1:
            survivors += 1
            print(f"not caught by {test} (exit code {code}): {file}: {old!r} -> {new!r}")
    print(
        f"{len(MUTATIONS) - survivors} of {len(MUTATIONS)} caught in {time.perf_counter() - start:.0f} s"
    )
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
