"""The greedy matching written as plainly as its definition: one search of the whole matrix for every merge."""

import math

import torch


def plain_greedy_zip(similarity, num_models, width, alpha, beta):
    n = len(similarity)
    clusters = [[feature] for feature in range(n)]
    score = similarity.clone()
    allowed = ~torch.eye(n, dtype=torch.bool)
    origin = torch.arange(n) // (n // num_models)
    budget = [math.floor((n - width) // num_models * beta)] * num_models
    limited = True

    def forbid(model):
        members = origin == model
        allowed[members[:, None] & members[None, :]] = False

    for model in range(num_models):
        if budget[model] <= 0:
            forbid(model)
    while len(clusters) > width:
        if not allowed.any():
            allowed = ~torch.eye(len(clusters), dtype=torch.bool)
            limited = False
        flat = score.masked_fill(~allowed, -math.inf).argmax().item()
        row, column = sorted(divmod(flat, len(clusters)))
        own = limited and origin[row] == origin[column]
        model = origin[row].item()
        score[row] = score[:, row] = alpha * torch.minimum(score[row], score[column])
        allowed[row] = allowed[:, row] = allowed[row] & allowed[column]
        allowed[row, row] = False
        keep = torch.arange(len(clusters)) != column
        clusters[row] += clusters[column]
        del clusters[column]
        score, allowed, origin = score[keep][:, keep], allowed[keep][:, keep], origin[keep]
        if own:
            budget[model] -= 1
            if budget[model] <= 0:
                forbid(model)
    labels = torch.empty(n, dtype=torch.int64)
    for label, cluster in enumerate(sorted(clusters, key=min)):
        labels[cluster] = label
    return labels
