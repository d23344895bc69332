//! What the policy promises.

use std::time::Duration;

use super::super::policy::{Limits, REQUEST_COST, Wish};
use super::super::{Class, Kind};
use super::{DRIPS, Event, FAST, Host, LIMITS, MIB, SEEDS, SEEDS_OF_ALL, Simulation, THROTTLES, anything};
use crate::registry::Origin;
use crate::sync::random::Random;

/// Whatever happens: the bounds hold, no place is idle for which somebody waits, and no wish is lost, promoted ones included.
#[test]
fn every_wish_is_granted_once_or_dropped_and_no_place_is_idle_that_could_be_had() {
    for seed in 0..SEEDS_OF_ALL {
        let mut simulation = anything(seed);
        simulation.checked = true;
        simulation.run();
    }
}

#[test]
fn within_a_repository_and_class_the_earliest_deadline_comes_first() {
    for seed in 0..SEEDS {
        let mut random = Random::new(seed);
        let mut simulation = Simulation::new(LIMITS);
        simulation.host("host", FAST);
        let mut order = Vec::new();
        for _ in 0..100 {
            let deadline = Duration::from_millis(random.below(1_000_000));
            let wish = Wish {
                owner: Origin::new("host", "image"),
                class: Class::Demand,
                kind: Kind::Table,
                bytes: 0,
                deadline,
            };
            order.push((deadline, simulation.wish(Duration::ZERO, wish)));
        }
        simulation.run();
        // Those that came while there was room were granted at once.
        let at_once = LIMITS.requests - LIMITS.requests / 4;
        let mut rest: Vec<_> = order
            .into_iter()
            .filter(|(_, number)| !simulation.grants[..at_once].contains(number))
            .collect();
        rest.sort();
        let rest: Vec<usize> = rest.into_iter().map(|(_, number)| number).collect();
        assert_eq!(simulation.grants[at_once..], rest);
    }
}

/// Readers of an image: each asks for the next thing when the last one has come. Returns their wishes.
fn readers(simulation: &mut Simulation, random: &mut Random, host: &str, image: &str, count: u64) -> Vec<usize> {
    let mut numbers = Vec::new();
    for _ in 0..count {
        let mut time = Duration::from_millis(random.below(5000) + 1000);
        for _ in 0..10 {
            let bytes = random.below(4 * MIB) + 1;
            let number = simulation.at(time, host, image, Class::Demand, bytes);
            // With nobody in the way.
            time += simulation.length(number) + Duration::from_millis(random.below(500) + 1);
            numbers.push(number);
        }
    }
    numbers
}

#[test]
fn hosts_that_hang_drip_or_throttle_delay_nobody_elsewhere() {
    for seed in 0..SEEDS {
        let run = |troubled: bool| {
            let mut simulation = Simulation::new(LIMITS);
            let mut random = Random::new(seed);
            simulation.host("good", FAST);
            let good = readers(&mut simulation, &mut random, "good", "image", 20);
            for (name, host) in [("hung", Host::Hangs), ("dripping", DRIPS), ("throttling", THROTTLES)] {
                simulation.host(name, host);
                for _ in 0..if troubled { 100 } else { 0 } {
                    let time = Duration::from_millis(random.below(4000));
                    let class = random.of(&Class::ALL);
                    simulation.at(time, name, "image", class, random.below(MIB / 16));
                }
            }
            simulation.run();
            simulation.fates[..good.len()].to_vec()
        };
        assert_eq!(run(true), run(false), "as if the others were not there (seed {seed})");
    }
}

#[test]
fn however_many_hosts_hang_a_newcomer_has_a_place() {
    let mut simulation = Simulation::new(LIMITS);
    for at in 0..40 {
        let name = format!("hung{at}");
        simulation.host(&name, Host::Hangs);
        for _ in 0..50 {
            simulation.at(Duration::ZERO, &name, "image", Class::Demand, 64 << 10);
        }
    }
    simulation.host("good", FAST);
    let one: Vec<usize> = (0..20)
        .map(|at| simulation.at(Duration::from_secs(1 + at), "good", "image", Class::Demand, 64 << 10))
        .collect();
    simulation.run();
    assert_eq!(simulation.longest(&one), Duration::ZERO);
}

#[test]
fn an_image_that_hangs_leaves_places_to_others_of_its_host() {
    for seed in 0..SEEDS {
        let mut simulation = Simulation::new(LIMITS);
        let mut random = Random::new(seed);
        // One name with several stores behind it, of which one hangs.
        simulation.host("host", FAST);
        simulation.host("host/hung", Host::Hangs);
        for _ in 0..100 {
            let time = Duration::from_millis(random.below(900));
            simulation.at(time, "host", "hung", Class::Demand, 4096);
        }
        let others = readers(&mut simulation, &mut random, "host", "other", 4);
        simulation.run();
        assert_eq!(simulation.longest(&others), Duration::ZERO, "seed {seed}");
    }
}

#[test]
fn demand_waits_for_one_request_at_most_behind_background() {
    for seed in 0..SEEDS {
        let mut random = Random::new(seed);
        let limits = Limits {
            requests: random.of(&[1, 2, 3, 4, 16]),
            ..LIMITS
        };
        let mut simulation = Simulation::new(limits);
        simulation.host("host", FAST);
        let mut lengths = Vec::new();
        for _ in 0..100 {
            let time = Duration::from_millis(random.below(1000));
            let class = random.of(&[Class::Prefetch, Class::ReadAhead, Class::Background]);
            let image = random.of(&["image", "another"]);
            let number = simulation.at(time, "host", image, class, random.below(4 * MIB));
            lengths.push(simulation.length(number));
        }
        let demand = readers(&mut simulation, &mut random, "host", "image", 1);
        simulation.run();
        let longest = simulation.longest(&demand);
        assert!(
            longest <= lengths.into_iter().max().unwrap(),
            "{longest:?}, seed {seed}"
        );
        if limits.requests >= 4 {
            assert_eq!(longest, Duration::ZERO, "places are kept for it (seed {seed})");
        }
    }
}

#[test]
fn where_little_is_asked_at_once_demand_and_parts_of_streams_have_their_places_all_the_same() {
    let mut simulation = Simulation::new(LIMITS);
    simulation.host("host", FAST);
    let (soon, later) = (Duration::from_millis(1), Duration::from_secs(2));
    simulation.at(Duration::ZERO, "host", "image", Class::Background, MIB);
    simulation.event(soon, Event::Allow("host".to_owned(), 4));
    let ahead: Vec<usize> = [Class::Prefetch, Class::ReadAhead, Class::Background]
        .into_iter()
        .flat_map(|class| [(class, "image"); 20])
        .map(|(class, image)| simulation.at(soon * 2, "host", image, class, MIB))
        .collect();
    let part = Wish {
        owner: Origin::new("host", "streamed"),
        class: Class::Prefetch,
        kind: Kind::Part,
        bytes: MIB,
        deadline: later,
    };
    let parts: Vec<usize> = (0..4).map(|_| simulation.wish(soon * 3, part.clone())).collect();
    let demand: Vec<usize> = (0..8)
        .map(|_| simulation.at(later, "host", "image", Class::Demand, MIB))
        .collect();
    simulation.run();
    assert_eq!(simulation.longest(&parts), Duration::ZERO);
    assert_eq!(simulation.longest(&demand), Duration::ZERO);
    // Two of one image at a time, for a tenth of a second each and its latency.
    let length = simulation.length(ahead[0]);
    assert!(simulation.longest(&ahead) >= length * (ahead.len() as u32 / 2 - 1));
}

#[test]
fn the_prefetch_of_one_image_does_not_delay_the_demand_of_another() {
    for seed in 0..SEEDS {
        let mut simulation = Simulation::new(LIMITS);
        let mut random = Random::new(seed);
        simulation.host("host", FAST);
        for _ in 0..100 {
            let time = Duration::from_millis(random.below(1000));
            simulation.at(time, "host", "prefetching", Class::Prefetch, random.below(4 * MIB));
        }
        let demand = readers(&mut simulation, &mut random, "host", "read", 4);
        simulation.run();
        assert_eq!(simulation.longest(&demand), Duration::ZERO, "seed {seed}");
    }
}

#[test]
fn images_get_the_same_whatever_the_size_of_their_requests() {
    for seed in 0..SEEDS {
        let mut simulation = Simulation::new(LIMITS);
        let mut random = Random::new(seed);
        simulation.host("host", FAST);
        let class = random.of(&Class::ALL);
        let sizes = [
            random.below(8 * MIB) + 1,
            random.below(8 * MIB) + 1,
            random.below(MIB) + 1,
        ];
        for (image, size) in ["first", "second", "third"].into_iter().zip(sizes) {
            // More than can be served in the time that is looked at.
            for _ in 0..150 {
                simulation.at(Duration::ZERO, "host", image, class, size);
            }
        }
        simulation.run();
        let cost = |size: u64| size.next_multiple_of(4096) + REQUEST_COST;
        let most = sizes.map(cost).into_iter().max().unwrap();
        let mut served = [0u64; 3];
        let mut left = [150; 3];
        // The first ones found the host idle.
        let settled = LIMITS.requests * 2;
        for (at, &number) in simulation.grants.iter().enumerate() {
            let image = number / 150;
            left[image] -= 1;
            if left[image] == 0 {
                break;
            }
            if at >= settled {
                served[image] += cost(sizes[image]);
                let (least, highest) = (served.iter().min().unwrap(), served.iter().max().unwrap());
                let bound = most * LIMITS.requests as u64;
                assert!(highest - least <= bound, "{served:?} of {sizes:?}, seed {seed}");
            }
        }
    }
}

#[test]
fn a_refill_does_not_wait_for_the_pulls_of_its_host() {
    for seed in 0..SEEDS {
        let mut simulation = Simulation::new(LIMITS);
        let mut random = Random::new(seed);
        simulation.host("host", Host::Hangs);
        let stream = |class, image: &str| Wish {
            owner: Origin::new("host", image),
            class,
            kind: Kind::Stream,
            bytes: 0,
            deadline: Duration::ZERO,
        };
        let pulls: Vec<usize> = (0..20)
            .map(|_| {
                let image = random.of(&["one", "two", "three"]);
                simulation.wish(
                    Duration::from_millis(random.below(1000)),
                    stream(Class::Prefetch, image),
                )
            })
            .collect();
        let refill = simulation.wish(Duration::from_secs(2), stream(Class::Demand, "one"));
        simulation.run();
        assert_eq!(simulation.wait(refill), Duration::ZERO);
        assert!(simulation.longest(&pulls) > Duration::ZERO);
    }
}

#[test]
fn wishes_for_much_memory_and_for_little_do_not_wait_for_each_other() {
    let mut simulation = Simulation::new(LIMITS);
    simulation.host("dripping", DRIPS);
    simulation.host("good", FAST);
    // Spans of 64 MiB, and as much to decode each.
    for _ in 0..16 {
        simulation.at(Duration::ZERO, "dripping", "image", Class::Demand, 128 * MIB);
    }
    let small: Vec<usize> = (0..40)
        .map(|at| simulation.at(Duration::from_secs(1 + at), "good", "image", Class::Demand, 8 * MIB))
        .collect();
    for _ in 0..200 {
        simulation.at(Duration::ZERO, "good", "another", Class::Background, 8 * MIB);
    }
    simulation.run();
    assert_eq!(simulation.longest(&small), Duration::ZERO);
}

#[test]
fn parts_of_streams_leave_a_host_to_those_who_wait() {
    for seed in 0..SEEDS {
        let mut simulation = Simulation::new(LIMITS);
        let mut random = Random::new(seed);
        simulation.host("host", FAST);
        simulation.host("another", FAST);
        let part = |host: &str, at: u64| Wish {
            owner: Origin::new(host, "streamed"),
            class: Class::Prefetch,
            kind: Kind::Part,
            bytes: 2 * MIB,
            deadline: Duration::from_secs(at),
        };
        let parts: Vec<usize> = (0..200)
            .map(|at| {
                let time = Duration::from_millis(random.below(8000));
                simulation.wish(time, part(random.of(&["host", "another"]), at))
            })
            .collect();
        let demand = readers(&mut simulation, &mut random, "host", "read", 2);
        simulation.run();
        assert_eq!(simulation.longest(&demand), Duration::ZERO, "seed {seed}");
        let waits = |part: usize, reader: usize| {
            let (granted, reader) = (simulation.fates[part].granted.unwrap(), simulation.fates[reader]);
            granted > reader.asked && Some(granted) < reader.ended
        };
        for &part in &parts {
            let here = *simulation.wishes[part].owner.host == *"host";
            let beside = demand.iter().any(|&reader| waits(part, reader));
            assert!(
                !here || !beside,
                "a part was granted while somebody waited (seed {seed})"
            );
        }
        let elsewhere = |&part: &usize| *simulation.wishes[part].owner.host == *"another";
        let longest = parts
            .iter()
            .copied()
            .filter(|part| elsewhere(part))
            .map(|part| simulation.wait(part));
        assert!(longest.max() < Some(Duration::from_secs(5)), "nobody waits there");
    }
}
