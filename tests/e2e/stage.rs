//! Everything one test needs, running: a registry behind a counting proxy, a containerd, the daemon.
//!
//! `LAZULI_E2E_SNAPSHOTTER=overlayfs` runs the tests that make sense for any snapshotter with containerd's own instead of Lazuli, which
//! shows whether a failure is the harness' or ours.

use crate::support::containerd::{Containerd, DIFFER, Generation, REFERENCE, WALKING, differ_proxy};
use crate::support::image::{Compression, Flavour, Image, Layer};
use crate::support::lazuli::{self, Lazuli, SNAPSHOTTER};
use crate::support::proxy::{Exchange, Link, Proxy};
use crate::support::registry::Registry;
use crate::support::sandbox::{Finished, PATIENCE, Sandbox, run, wait_until};
use crate::support::tree::{Comparison, Options, compare};

/// The snapshotter under test.
pub fn subject() -> String {
    std::env::var("LAZULI_E2E_SNAPSHOTTER").unwrap_or_else(|_| lazuli::SNAPSHOTTER.to_owned())
}

/// A registry, a containerd and a daemon. Fields are dropped in this order: users before what they use.
pub struct Stage {
    /// containerd.
    pub containerd: Containerd,
    /// The daemon; absent when another snapshotter is tested.
    pub lazuli: Option<Lazuli>,
    /// The way to the registry; images are named by its address.
    pub proxy: Proxy,
    /// The registry.
    pub registry: Registry,
    /// Their place.
    pub sandbox: Sandbox,
}

impl Stage {
    /// Starts all of them.
    pub fn new(name: &str, generation: Generation) -> Self {
        Self::with(name, generation, "", |_| {})
    }

    /// Starts all of them; `config` is added to the daemon's configuration, in which `REGISTRY` is the proxy's address, and `prepare` is
    /// called before anything is started.
    pub fn with(name: &str, generation: Generation, config: &str, prepare: impl FnOnce(&Sandbox)) -> Self {
        Self::around(name, config, prepare, |sandbox| {
            Containerd::start(sandbox, generation, &lazuli::address_in(sandbox))
        })
    }

    /// All of them around a containerd that has layers applied by Lazuli; `containerd` is added to its configuration.
    pub fn applying(name: &str, generation: Generation, containerd: &str) -> Self {
        Self::configured(name, generation, |_| containerd.to_owned(), "")
    }

    /// All of them around a containerd that knows no differ but its own, whatever the environment says.
    pub fn unpacking(name: &str, generation: Generation) -> Self {
        Self::around(
            name,
            "",
            |_| {},
            |sandbox| {
                let address = lazuli::address_in(sandbox);
                let mut containerd = Containerd::start_with(sandbox, generation.clone(), &address, WALKING, "");
                if generation != Generation::One {
                    containerd.reconfigure(&differ_proxy(&address), "");
                }
                containerd
            },
        )
    }

    /// All of them around a containerd that knows Lazuli's differ and does not use it.
    pub fn ignoring(name: &str, generation: Generation) -> Self {
        Self::around(
            name,
            "",
            |_| {},
            |sandbox| Containerd::start_with(sandbox, generation, &lazuli::address_in(sandbox), WALKING, ""),
        )
    }

    /// The same as [`Stage::applying`], with what `configure` adds to the configuration of containerd; `config` is added to the daemon's.
    pub fn configured(
        name: &str,
        generation: Generation,
        configure: impl FnOnce(&Sandbox) -> String,
        config: &str,
    ) -> Self {
        Self::around(
            name,
            config,
            |_| {},
            |sandbox| {
                let more = configure(sandbox);
                Containerd::start_with(sandbox, generation, &lazuli::address_in(sandbox), DIFFER, &more)
            },
        )
    }

    fn around(
        name: &str,
        config: &str,
        prepare: impl FnOnce(&Sandbox),
        containerd: impl FnOnce(&Sandbox) -> Containerd,
    ) -> Self {
        let sandbox = Sandbox::new(name);
        prepare(&sandbox);
        let registry = Registry::start(&sandbox);
        let proxy = Proxy::start(registry.address, Link::default());
        let containerd = containerd(&sandbox);
        let lazuli = (subject() == lazuli::SNAPSHOTTER).then(|| {
            Lazuli::start(
                &sandbox,
                &containerd.address,
                &[proxy.host()],
                &config.replace("REGISTRY", &proxy.host()),
            )
        });
        Stage {
            containerd,
            lazuli,
            proxy,
            registry,
            sandbox,
        }
    }

    /// The daemon; for tests that only make sense with it.
    pub fn lazuli(&mut self) -> &mut Lazuli {
        self.lazuli.as_mut().expect("this test is about the daemon")
    }

    /// Starts the daemon again after its end, and waits until containerd has found it: between two attempts to connect it pauses for
    /// up to 3 s, in which it fails all calls.
    pub fn restart_daemon(&mut self) {
        self.lazuli().restart();
        self.await_containerd();
    }

    /// Waits until containerd has found the daemon that was started anew.
    pub fn await_containerd(&self) {
        let snapshots = ["snapshots", "--snapshotter", SNAPSHOTTER];
        let probe = self.containerd.new_id();
        // Listing would not ask the daemon while there is nothing to list.
        let mut prepare = self.containerd.ctr(&[&snapshots[..], &["prepare", &probe]].concat());
        wait_until(PATIENCE, || run(&mut prepare, PATIENCE).success().then_some(()))
            .expect("containerd does not find the daemon again");
        run(
            &mut self.containerd.ctr(&[&snapshots[..], &["rm", &probe]].concat()),
            PATIENCE,
        );
    }

    /// Has Lazuli look for the registry at another address; containerd still reaches it.
    pub fn hide_registry(&self, address: &str) {
        let server = format!("http://{address}");
        let dir = self.sandbox.dir("certs.d").join(self.proxy.host());
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("hosts.toml"), format!("server = {server:?}\n")).unwrap();
    }

    /// Pushes an image and returns its reference.
    pub fn push(&self, image: &Image, name: &str) -> String {
        self.registry.push(image, name);
        format!("{}/{name}", self.proxy.host())
    }

    /// Pushes an image, has its layers converted by stargz' `ctr-remote` with these options, pushes the result as `name` and returns
    /// its reference. containerd forgets both images.
    pub fn push_converted(&self, image: &Image, name: &str, options: &[&str]) -> String {
        let plain = self.push(image, &format!("{name}-plain"));
        let converted = format!("{}/{name}", self.proxy.host());
        self.containerd.fetch(&plain);
        self.containerd.convert(&plain, &converted, options);
        self.containerd.push(&converted);
        self.containerd.remove_image(&plain);
        self.containerd.remove_image(&converted);
        self.proxy.take();
        converted
    }

    /// Makes an eStargz image of an ordinary one and takes it out of the registry, for tests that serve it themselves.
    pub fn converted(&self, image: &Image, options: &[&str]) -> Image {
        let reference = self.push_converted(image, "convert/this:1", options);
        self.containerd.fetch(&reference);
        let manifest = self.containerd.manifest(&reference);
        let layers = manifest["layers"]
            .as_array()
            .expect("a manifest has layers")
            .iter()
            .map(|descriptor| {
                let digest = descriptor["digest"].as_str().expect("a descriptor has a digest");
                let blob = self.containerd.ctr_ok(&["content", "get", digest]).stdout;
                let mut layer = Layer::from_blob(Compression::Gzip, blob);
                for (key, value) in descriptor["annotations"]
                    .as_object()
                    .expect("eStargz layers have annotations")
                {
                    layer
                        .annotations
                        .insert(key.clone(), value.as_str().expect("annotations are texts").to_owned());
                }
                layer
            });
        let image = Image::new(Flavour::Oci, layers.collect());
        self.containerd.remove_image(&reference);
        image
    }

    /// Pulls an image for the snapshotter under test: by stock `ctr` where that is lazy (2.x), by `lazuli pull` elsewhere.
    pub fn pull(&self, reference: &str) -> Finished {
        self.try_pull(reference).expect_success()
    }

    /// The same, whether it succeeds or not.
    pub fn try_pull(&self, reference: &str) -> Finished {
        match &self.lazuli {
            Some(lazuli) if self.containerd.generation == Generation::One => lazuli.pull(reference),
            _ => self.containerd.pull(reference, &subject()),
        }
    }

    /// Runs a shell script in a new container on the snapshotter under test.
    pub fn sh(&self, reference: &str, script: &str) -> String {
        self.containerd.sh(reference, &subject(), script)
    }

    /// Pulls an image with both snapshotters and compares what their containers would see.
    pub fn compare(&self, reference: &str, options: &Options) -> Comparison {
        self.pull(reference);
        self.containerd.pull(reference, REFERENCE).expect_success();
        let reference_view = self.containerd.view(reference, REFERENCE);
        let view = self.containerd.view(reference, &subject());
        compare(&reference_view.path, &view.path, options)
    }

    /// Requests for blobs since the last call of [`Proxy::take`].
    pub fn blob_requests(&self) -> Vec<Exchange> {
        self.proxy.exchanges().into_iter().filter(Exchange::is_blob).collect()
    }
}

/// A containerd 1.x and, if it is there, a 2.x.
pub fn generations() -> Vec<Generation> {
    [Some(Generation::One), Generation::two()]
        .into_iter()
        .flatten()
        .collect()
}
