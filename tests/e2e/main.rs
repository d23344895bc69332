//! End-to-end tests.
#![deny(unsafe_code)]

#[path = "../support/mod.rs"]
mod support;
mod torture;

use support::containerd::{Containerd, Generation, REFERENCE};
use support::image::{Compression, Flavour, ordinary};
use support::lazuli;
use support::proxy::{Link, Proxy};
use support::registry::Registry;
use support::sandbox::Sandbox;
use support::tree::{Options, compare};

#[test]
fn harness() {
    for generation in [Some(Generation::One), Generation::two()].into_iter().flatten() {
        let sandbox = Sandbox::new("harness");
        let registry = Registry::start(&sandbox);
        let proxy = Proxy::start(registry.address, Link::default());
        let containerd = Containerd::start(&sandbox, generation, &lazuli::address_in(&sandbox));
        let image = ordinary(Flavour::Oci, Compression::Gzip);
        support::registry::push(proxy.address, &image, "demo/app:1");
        println!("{:?}", registry.requests());
        proxy.take();
        let reference = format!("{}/demo/app:1", proxy.host());
        println!("{}", containerd.pull(&reference, REFERENCE).expect_success().describe());
        println!("{:?}", proxy.exchanges());
        println!("{}", containerd.sh(&reference, REFERENCE, "sha256sum app/data/*; ls -la /; cat /proc/self/mountinfo"));
        let a = containerd.view(&reference, REFERENCE);
        let b = containerd.view(&reference, REFERENCE);
        println!("{:?}", compare(&a.path, &b.path, &Options::default()).expect_equal());
        drop((a, b));
        let id = containerd.start_container(&reference, REFERENCE);
        println!("{}", containerd.exec(&id, "echo x > /app/x; cat /app/x").describe());
        containerd.remove_container(&id);
        containerd.start_container(&reference, REFERENCE);
        println!("{:?}", containerd.snapshots(REFERENCE));
    }
}
