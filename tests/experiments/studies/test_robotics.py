"""Robotics: foresight by a walk along the driver's way, budgets by brute force, attention by loops."""

import numpy as np
import pytest
from scipy.interpolate import RegularGridInterpolator

from experiments.models.packed_encoder import pack
from experiments.robotics import crossing, data, expert, foresight, policy, vehicles
from experiments.robotics.crossing import FEATURES, ROWS
from experiments.robotics.foresight import Worth

SCENES = 12


def some():
    """Scenes on the road before the arc, and what vehicles' classes are worth."""
    rng = np.random.default_rng(0)
    seen = np.zeros((SCENES, ROWS, len(FEATURES)), np.float32)
    seen[..., 0] = rng.random((SCENES, ROWS)) < 0.6
    seen[..., 1:3] = rng.uniform(-0.6, 0.6, (SCENES, ROWS, 2))
    seen[..., 3:5] = rng.uniform(-0.5, 0.5, (SCENES, ROWS, 2))
    seen[:, 0, :5] = [1, 0.02, 0, 0, 0]
    seen[:, 0, 2] = rng.uniform(0.12, 0.5, SCENES)
    seen[:, 0, 4] = rng.uniform(-0.45, 0, SCENES)
    seen *= seen[..., :1]
    classes = len(foresight.WHEN) * len(foresight.HOW_NEAR)
    return seen, Worth(rng.random(classes).astype(np.float32))


def test_the_approach_is_that_of_a_walk_along_the_way():
    seen, _ = some()
    when, near = foresight.approach(seen)
    for scene in range(SCENES):
        # North, then a left turn of 13 m, then west: the heading is integrated step by step.
        own = seen[scene, 0].astype(float)
        x, y, speed, heading, step = own[1] * 100, own[2] * 100, -own[4] * 20, np.pi / 2, 1e-3
        path = [(x, y)]
        for _ in range(6000):
            speed += (9.0 - speed) * step / 0.6
            if y <= 11 and heading < np.pi:
                heading += speed * step / 13
            x, y = x + np.cos(heading) * speed * step, y - np.sin(heading) * speed * step
            path.append((x, y))
        path = np.array(path)[250::250] - path[0]
        for row in range(1, ROWS):
            other = seen[scene, row].astype(float)
            velocity = 20 * (other[3:5] + own[3:5])
            times = 0.25 * np.arange(1, 25)[:, None]
            apart = np.hypot(*(100 * other[1:3] + velocity * times - path).T)
            assert near[scene, row] == pytest.approx(apart.min(), abs=0.05)
            assert apart[round(when[scene, row] / 0.25) - 1] <= apart.min() + 0.05


def test_a_vehicle_is_worth_what_lies_between_its_classes():
    seen, worth = some()
    when, near = foresight.approach(seen)
    nodes = (foresight.WHEN, foresight.HOW_NEAR)
    table = RegularGridInterpolator(nodes, worth.by_class.reshape(*map(len, nodes)))
    wanted = table(np.stack([when, np.minimum(near, foresight.HOW_NEAR[-1])], -1))
    found = worth.of_rows(seen)
    others = (seen[..., 0] > 0) & (np.arange(ROWS) > 0)
    np.testing.assert_allclose(found[others], wanted[others], rtol=1e-5)
    assert not found[~others].any()


def test_learned_worth_is_the_mean_of_a_class_by_what_a_few_vehicles_say():
    seen, _ = some()
    known = data.Scenes(seen, np.zeros((SCENES, 3)), np.full((SCENES, ROWS), 2.0, np.float32))
    found = Worth.of(known).by_class
    number = foresight.classes(seen)[vehicles.present(seen)].sum(0)
    np.testing.assert_allclose(found, 2 * number / (number + foresight.TRUST), rtol=1e-5)


@pytest.mark.parametrize("part", [0.5, 0.25])
@pytest.mark.parametrize("arm", vehicles.ARMS)
def test_a_budget_is_spent_and_never_exceeded(arm, part):
    seen, worth = some()
    mask = vehicles.kept(arm, part, seen, worth, SCENES)
    there = vehicles.present(seen)
    assert not (mask & ~there).any()
    assert mask.sum() == (there.sum() if arm == "full" else int(part * there.sum()))


def test_the_ladder_takes_the_worthiest_of_all_scenes():
    seen, worth = some()
    mask, w = vehicles.kept("ladder", 0.5, seen, worth, SCENES), worth.of_rows(seen)
    assert w[mask].min() >= w[vehicles.present(seen) & ~mask].max()
    assert len(set(mask.sum(1))) > 2  # by what there is to see


def test_the_nearest_are_the_nearest():
    seen, worth = some()
    mask = vehicles.kept("nearest", 0.5, seen, worth, SCENES)
    apart = np.hypot(seen[..., 1], seen[..., 2])
    for own, m, there in zip(apart, mask, vehicles.present(seen), strict=True):
        assert own[m].max(initial=0) <= own[there & ~m].min(initial=9)
    counts = mask.sum(1)[vehicles.present(seen).sum(1) > mask.sum(1).max()]
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("arm", ["proportional", "ladder"])
def test_a_rule_of_one_scene_spends_the_budget_over_all_and_cuts_what_is_least(arm):
    seen, worth = some()
    whole = vehicles.Rule.of(arm, 0.5, seen, worth)
    rule = whole._replace(capacity=whole.capacity - 1)
    mask, beyond = rule.keep(seen, worth)
    alone = [rule.keep(scene[None], worth)[0][0] for scene in seen]
    np.testing.assert_array_equal(mask, alone)
    w, there = worth.of_rows(seen), vehicles.present(seen)
    if arm == "ladder":
        wanted = (w > rule.rate) & there
        assert wanted.sum() == int(0.5 * there.sum())
        np.testing.assert_array_equal(mask[~beyond], wanted[~beyond])
        np.testing.assert_array_equal(beyond, wanted.sum(1) > rule.capacity)
    assert beyond.any()
    assert (mask.sum(1)[beyond] == rule.capacity).all()
    for own, m, t in zip(w[beyond], mask[beyond], there[beyond], strict=True):
        assert own[m].min() >= own[t & ~m].max()


def test_attention_is_over_each_drivers_own():
    rng = np.random.default_rng(1)
    query, keys, values = (rng.normal(size=(n, 2, 4)).astype(np.float32) for n in (3, 9, 9))
    example = np.array([0, 1, 2, 0, 0, 2, 3, 3, 3])  # 3: nobody
    found = np.asarray(policy.attend(query, keys, values, example))
    for b in range(3):
        own = example == b
        for head in range(2):
            weight = np.exp(keys[own, head] @ query[b, head] / 2)
            wanted = weight @ values[own, head] / weight.sum()
            np.testing.assert_allclose(found[b, head], wanted, rtol=1e-5)


def test_a_driver_says_the_same_alone_and_with_empty_places():
    from flax import nnx

    seen, _ = some()
    model = policy.Driver(nnx.Rngs(0))
    labels = np.concatenate([np.zeros((SCENES, 3), np.float32), seen[:, 0]], axis=1)
    told = np.concatenate([seen, foresight.foreseen(seen)], axis=-1)
    rows = [{"seen": x[m]} for x, m in zip(told, vehicles.present(seen), strict=True)]
    together = np.asarray(model(pack(rows, labels, SCENES * ROWS, SCENES + 2)))
    alone = model(pack(rows[3:4], labels[3:4], ROWS, 1))
    np.testing.assert_allclose(alone[0], together[3], rtol=1e-4, atol=1e-5)
    assert np.isfinite(together).all()


def test_the_expert_avoids_what_it_foresees_and_is_fast_else():
    speed, never = 9.0, len(expert.TIMES)
    free = np.full((1, len(expert.PLANS)), never)
    assert (expert.PLANS[expert.decide(speed, free)] == 2).all()
    ahead = np.where(expert.PLANS[:, 0] == 2, 10, never)[None]
    ahead[:, expert.PLANS[:, 0] == 1] = 10  # at full speed, as fast
    assert expert.PLANS[expert.decide(speed, ahead), 0] == 0
    value = expert.by_action(speed, ahead)
    assert int(expert.best(value)) == 0
    assert int(expert.best(np.zeros(3))) == 2
    alone = expert.worth(speed, np.concatenate([ahead, free]))
    twice = expert.worth(speed, np.concatenate([ahead, ahead]))
    gain = value[0] - value[2]
    np.testing.assert_allclose(alone, [gain, 0], rtol=1e-5)
    np.testing.assert_allclose(twice, [gain / 2, gain / 2], rtol=1e-5)


def test_bad_sensors_spare_the_driver_and_add_nobody():
    seen, _ = some()
    rng = np.random.default_rng(2)
    noisy, missing = crossing.noisy(seen[0], rng, 2.0, 1.0), crossing.missing(seen[0], rng, 0.5)
    for found in (noisy, missing):
        np.testing.assert_array_equal(found[0], seen[0, 0])
        assert not found[seen[0, :, 0] == 0].any()
    there = vehicles.present(seen)[0]
    assert (noisy[there, 1:5] != seen[0, there, 1:5]).all()
    assert 0 < (missing[:, 0] < seen[0, :, 0]).sum() < there.sum()


def test_recorded_worth_stands_in_the_rows_of_the_vehicles():
    found = data.record(3, 1)
    assert found.seen.shape == (*found.worth.shape, len(FEATURES))
    assert not found.worth[~vehicles.present(found.seen)].any()
    assert (found.worth > 0).any()
    blocked = found.worth.max(1) > 0
    # Who is worth seeing is on the way within the planner's foresight.
    _, near = foresight.approach(found.seen)
    chosen = found.worth[blocked].argmax(1)
    assert np.median(near[blocked, chosen]) < np.median(near[vehicles.present(found.seen)])


def test_a_moment_is_what_the_same_actions_lead_to_and_is_driven_once():
    actions = [2, 0, 2, 1]
    env = crossing.make()
    seen, _ = env.reset(seed=5)
    start = now = crossing.begin(5)
    np.testing.assert_array_equal(now.seen, seen)
    start.step(1)  # a way that is not taken changes nothing
    for action in actions:
        seen, reward, *_ = env.step(action)
        now = now.step(action)
        np.testing.assert_array_equal(now.seen, seen)
        assert now.reward == reward
    assert start.step(2).step(0).step(2).step(1) is now
