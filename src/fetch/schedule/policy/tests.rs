//! What no simulation shows by its waits alone.

use super::places::HOSTS;
use super::*;

const LIMITS: Limits = Limits {
    requests: 1,
    streams: 1,
    memory: 1 << 30,
};

fn wish(host: &str) -> Wish {
    Wish {
        owner: Origin::new(host, "image"),
        class: Class::Demand,
        kind: Kind::Request,
        bytes: 4096,
        deadline: Duration::ZERO,
    }
}

/// Grants all that may run now.
fn grant_all(policy: &mut Policy) -> Vec<Id> {
    std::iter::from_fn(|| policy.grant()).collect()
}

#[test]
fn hosts_take_turns_when_there_are_more_than_places() {
    let mut policy = Policy::new(LIMITS);
    let names: Vec<String> = (0..2 * HOSTS).map(|at| format!("host{at:03}")).collect();
    let mut hosts = HashMap::new();
    for name in names.iter().chain(&names).chain(&names) {
        hosts.insert(policy.ask(wish(name)), name.clone());
    }
    let mut running = grant_all(&mut policy);
    let mut served: Vec<String> = running.iter().map(|id| hosts[id].clone()).collect();
    // Each that ends makes place for one.
    while served.len() < names.len() {
        policy.end(running.remove(0));
        let next = grant_all(&mut policy);
        assert!(!next.is_empty());
        served.extend(next.iter().map(|id| hosts[id].clone()));
        running.extend(next);
    }
    served.sort();
    assert_eq!(served, names, "each has been served once before any is served again");
}

#[test]
fn all_hosts_together_have_no_more_places_than_there_are() {
    let limits = Limits { requests: 16, ..LIMITS };
    let mut policy = Policy::new(limits);
    for host in 0..100 {
        for _ in 0..16 {
            policy.ask(wish(&host.to_string()));
        }
    }
    let granted = grant_all(&mut policy);
    let all = 16 * HOSTS;
    assert!(granted.len() <= all, "{} of {all}", granted.len());
    // The last ones are for hosts that have none.
    assert!(policy.counts().1 >= 100.min(all));
}
