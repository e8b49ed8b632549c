import numpy as np
def lay_out(features, order):
    """The same (N, C, H, W) values in another memory order."""
    if order == "channels-last":
        return np.ascontiguousarray(features.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    if order == "transposed":
        return np.ascontiguousarray(features.transpose(3, 1, 0, 2)).transpose(2, 1, 3, 0)
    if order == "negative":
        return features[::-1, ::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1, ::-1]
    if order == "sliced":
        wide = np.zeros([2 * n + 1 for n in features.shape], features.dtype)
        wide[1::2, 1::2, 1::2, 1::2] = features
        return wide[1::2, 1::2, 1::2, 1::2]
    if order == "swapped":
        return features if features.dtype.name == "bfloat16" else features.astype(features.dtype.newbyteorder("S"))
    if order == "unaligned":
        raw = np.empty(features.nbytes + 1, np.uint8)
        view = raw[1:].view(features.dtype).reshape(features.shape)
        view[...] = features
        return view
    if order == "read-only":
        features.flags.writeable = False
    return features


ORDERS = ["contiguous", "channels-last", "transposed", "negative", "sliced", "swapped", "unaligned", "read-only"]
