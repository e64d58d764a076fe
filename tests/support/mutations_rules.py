"""One-line defects of chains, local rules and skip paths, as in `mutations`."""

from __future__ import annotations

ALIGNED = "rules/test_rules_alignment.py"
AUGLOCAL = "rules/test_rules_auglocal.py"
AUGMENTED = "rules/test_rules_augmented.py"
BLOCKS = "model/blocks.py"
CCL = "rules/test_rules_ccl.py"
CUTS = "engine/cuts.py"
CWCOMP = "rules/test_rules_cwcomp.py"
HEADS = "rules/test_rules_local_heads.py"
HIGHWAY = "rules/test_rules_highway.py"
INFOPRO = "rules/test_rules_infopro.py"
PEPITA = "rules/test_rules_pepita.py"
PREDICTIVE = "rules/test_rules_predictive.py"
SEGMENTED = "rules/test_rules_segmented.py"
SIGNS = "rules/test_rules_signs.py"

RULES = (
    # segments
    ("topologies.py", "chain(layer_inputs, form, shared=True).edges", "chain(layer_inputs, form).edges", SEGMENTED),
    ("topologies.py", "Edge(source, as_activity(edge.site), operator)", "Edge(source, edge.site, operator)", "parallel/test_order.py"),
    ("topologies.py", "top = fit[0] + 1", "top = fit[0]", SEGMENTED),
    ("topologies.py", "lowest = top - 1 - steps", "lowest = max(0, top - 2 - steps)", SEGMENTED),
    ("topologies.py", "if layer_inputs[i].dominates]", "]", SEGMENTED),
    ("rules/direct/segmented_kp.py", "DKP(strength=self.strength, operator", "DKP(operator", SEGMENTED),
    ("rules/direct/segmented_kp.py", "return self._entry.feedback_grad(edge, weights, d, h)", "return self._entry.feedback_grad(edge, weights, -d, h)", SEGMENTED),
    ("engine/mirrored.py", "there[edge] if before == now[edge] else (-1, there[edge][1])", "there[edge]", "core/test_mirrored.py"),
    ("engine/mirrored.py", "there[edge] if before == now[edge] else (-1, there[edge][1])", "before", "core/test_mirrored.py"),
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
    ("rules/direct/augmented.py", "sent * DERIVATIVES[self.derivative](h)", "sent", AUGMENTED),
    ("rules/direct/augmented.py", "return edge.site.activation(h) if", "return h if", AUGMENTED),
    ("rules/local/pepita.py", "return a + shift.reshape(a.shape)", "return a - shift.reshape(a.shape)", PEPITA),
    ("rules/local/pepita.py", "len(error) * error", "error", PEPITA),
    ("rules/local/pepita.py", "/ (len(before) * places)", "/ len(before)", PEPITA),
    ("rules/local/cwcomp.py", "self.reader(h.square())", "self.reader(h).square()", CWCOMP),
    ("rules/local/cwcomp.py", "* classes // reader.width", "% classes", CWCOMP),
    ("rules/local/auglocal.py", "self.taper * (self.depth - 1)", "self.taper * self.depth", AUGLOCAL),
    ("rules/local/auglocal.py", "+ depth) // (2 * depth)", ") // (2 * depth)", AUGLOCAL),
    ("rules/local/auglocal.py", "form.groups if not shape[0] % form.groups else 1", "1", AUGLOCAL),
    ("rules/local/auglocal.py", "(i > last and", "(True and", AUGLOCAL),
    ("rules/local/auglocal.py", "nn.LayerNorm if per_token(site, source) else nn.BatchNorm1d", "nn.BatchNorm1d", AUGLOCAL),
    ("rules/local/auglocal.py", "_pooled(shape, layer.entering[1:])", "[]", AUGLOCAL),
    ("model/context.py", "if start >= made", "if start > made", AUGLOCAL),
    ("model/context.py", "in calls[:-1]", "in calls", AUGLOCAL),
    ("model/context.py", "and not projection", "", AUGLOCAL),
    ("rules/local/infopro.py", "share * prediction", "prediction", INFOPRO),
    ("rules/local/infopro.py", "* place / max(1, len(sites) - 1)", "* place / len(sites)", INFOPRO),
    ("rules/local/infopro.py", "kept if same else 0", "0", INFOPRO),
    (CUTS, "tape.read[index] = cut, cut._version", "tape.read[index] = cut.clone(), 0", INFOPRO),
    ("rules/local/ccl.py", "        with torch.no_grad():\n            c = above", "        if True:\n            c = above", CCL),
    ("rules/local/ccl.py", "F.normalize(h) * counted", "h * counted", CCL),
    ("rules/local/ccl.py", "self.spread * apart", "apart", CCL),
    ("rules/local/predsim.py", "(1 - self.similarity) * prediction", "prediction", HEADS),
    ("rules/local/predsim.py", "x = x.flatten(2).std(2)", "x = x.flatten(2).mean(2)", HEADS),
    ("rules/local/predsim.py", "x = x - x.mean(1, keepdim=True)", "pass", HEADS),
    ("rules/local/predsim.py", "(z - z.detach()) @ self.back.t()", "(z - z.detach()) @ self.decoder.weight.t()", HEADS),
    ("activity.py", "return self.unflattened", "return ()", HEADS),
    ("model/autograd_graph.py", 'startswith(("Permute", "Transpose"))', 'startswith("None")', "core/test_sites.py"),
    ("rules/local/predsim.py", "(wanted > 0)", "(wanted < 0)", HEADS),
    ("rules/local/lls.py", "F.normalize(self.reader(h), dim=1)", "self.reader(h)", HEADS),
    ("rules/local/lls.py", "scores / self.temperature", "scores", HEADS),
    ("rules/local/heads.py", "h.flatten(1, self.averaged).mean(1).flatten(1)", "h.flatten(1, self.averaged).sum(1).flatten(1)", HEADS),
    # skip paths
    ("engine/autograd.py", "before = ctx.held.pop() if ctx.held else torch.zeros_like(grad)", "before = grad", HIGHWAY),
    ("engine/autograd.py", "            held.clear()\n", "            pass\n", HIGHWAY),
    ("engine/autograd.py", "for _ in range(ctx.sweeps)", "for _ in range(1)", HIGHWAY),
    ("measure/cost.py", "passed + isinstance(child, DEFER)", "passed", HIGHWAY),
    (BLOCKS, "return [] if gate or joint or", "return [] if joint or", "core/test_blocks.py"),
    (BLOCKS, 'startswith(("Cat", "Stack"))', 'startswith("Stack")', "core/test_blocks.py"),
    (BLOCKS, "apart = isinstance(child, _RUNS) or stages or", "apart = isinstance(child, _RUNS) or", "core/test_blocks.py"),
    (BLOCKS, "name for name in whole if items.get(name) in runs", "n for n in calls if items.get(n) in runs", "core/test_blocks.py"),
    (BLOCKS, "trace.counts[c.name] == 1 and", "", "core/test_blocks.py"),
    (BLOCKS, "if listed := whole & {*items}", "if listed := {*items} & {*calls}", "core/test_blocks.py"),
    ("model/branches.py", "min(through, fewest.get(other, through))", "through", HIGHWAY),
    ("model/branches.py", "for skip in (0, 1)", "for skip in (0,)", HIGHWAY),
)  # fmt: skip
