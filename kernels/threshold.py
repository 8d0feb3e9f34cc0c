import torch


def keep_largest(acts, count):
    values, places = acts.flatten().sort(descending=True, stable=True)
    values, places = values[:count], places[:count]
    kept = torch.zeros_like(acts).flatten().scatter(0, places, values).view_as(acts)
    least = torch.where(values > 0, values, torch.inf).amin()
    return kept, torch.where(least.isinf(), 0, least)
