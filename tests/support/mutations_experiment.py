"""One-line defects of the experiment layer and of optimizers, as in `mutations`."""

from __future__ import annotations

CLICKS, SENTENCES = "experiment/test_clicks.py", "experiment/test_sentences.py"
MUON = "core/test_muon.py"

EXPERIMENT = (
    # clicks
    ("experiment/data/clicks.py", "    count = count.double()\n", "", CLICKS),
    ("experiment/data/clicks.py", "if values > MOST_VALUES:", "if False:", CLICKS),
    ("experiment/data/clicks.py", "(count - 1) / 2)[place]", "count / 2)[place]", CLICKS),
    ("experiment/data/clicks.py", "starts = np.cumsum(sizes) - sizes", "starts = np.zeros_like(sizes)", CLICKS),
    ("experiment/data/clicks.py", "order[:eighth], order[eighth : 3", "order[:eighth], order[: 3", CLICKS),
    ("experiment/nets/deepfm.py", "v.square().sum(1)).sum(1, keepdim=True) / 2", "v.square().sum(1)).sum(1, keepdim=True)", CLICKS),
    ("experiment/training/run.py", "seen.append((output.float().cpu(), labels.cpu()))", "seen[:] = [(output.float().cpu(), labels.cpu())]", CLICKS),
    # sentences and byte-pair tokens
    ("experiment/nets/sentences.py", "self.rnn(h)[0] * there.unsqueeze(-1)", "self.rnn(h)[0]", SENTENCES),
    ("experiment/nets/transformer.py", "h if there is None else h * there.unsqueeze(-1)", "h", SENTENCES),
    ("experiment/nets/transformer.py", "None if there is None else there[:, None, None]", "None", SENTENCES),
    ("experiment/data/sentences.py", "_tokenizer(rows[0][0])", "_tokenizer(rows[2][0])", SENTENCES),
    ("experiment/data/sentences.py", "found[name] = [texts[i] for i in taken], labels[taken]", "found[name] = [texts[i] for i in taken], labels[: len(taken)]", SENTENCES),
    ("experiment/data/text.py", "train_from_iterator(lines[0],", "train_from_iterator(lines[2],", "experiment/test_tokens.py"),
    ("operators/dense.py", "reshape(units, *site).mul_(self.scale)", "reshape(units, *site)", "operators/test_operators.py"),
    # Muon
    ("optim.py", "2.0315 * gram @ gram - 4.7750 * gram", "2.0315 * gram @ gram + 4.7750 * gram", MUON),
    ("optim.py", "G + mu * M if group", "G + M if group", MUON),
    ("optim.py", "math.sqrt(max(matrix.shape))", "math.sqrt(min(matrix.shape))", MUON),
    ("optim.py", "1 - second ** state", "second ** state", MUON),
    ("optim.py", "1 - group[\"lr\"] * group[\"weight_decay\"]", "1 - group[\"weight_decay\"]", MUON),
)  # fmt: skip
