import torch

from ptp.decoding.layout import CallShape, RowLayout, call_layout, key_positions


def test_keys_stand_where_their_text_has_them_also_behind_shorter_caches() -> None:
    # A token and a draft each; the first text opens two window positions for the case that the draft is wrong.
    layouts = [RowLayout(1, 1, (2, 0)), RowLayout(1, 1, (0, 1))]
    layout = call_layout(layouts, CallShape.of(layouts), 0, torch.device("cpu"))
    found = key_positions(layout, [4, 2], torch.tensor([[4], [2]]))
    assert found[0].tolist() == [0, 1, 2, 3, 4, 5, 5, 6]
    # Two tokens cached, then the call's: token, draft, a window position for the case that the draft is right; padding.
    assert found[1, :5].tolist() == [0, 1, 2, 3, 4]
