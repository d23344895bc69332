//! `lazuli mount`, `lazuli status`, `lazuli check-config`, and errors a person can act on.

use std::process::Command;

use crate::stage::{Stage, subject};
use crate::support::containerd::{Generation, REFERENCE};
use crate::support::image::{Compression, Flavour, ordinary};
use crate::support::lazuli::{self, Mounted};
use crate::support::registry::Registry;
use crate::support::sandbox::{COMMAND_TIMEOUT, PATIENCE, Sandbox, run};
use crate::support::tree::{Options, compare};

#[test]
fn mount_shows_an_oci_layout() {
    let stage = Stage::new("mount_shows_an_oci_layout", Generation::One);
    let image = ordinary(Flavour::Oci, Compression::Gzip);
    let layout = stage.sandbox.path("layout");
    image.write_layout(&layout, "1");
    let reference = stage.push(&image, "demo/app:1");
    stage.containerd.pull(&reference, REFERENCE).expect_success();
    let view = stage.containerd.view(&reference, REFERENCE);
    let mounted = Mounted::new(&stage.sandbox, &format!("oci:{}", layout.display()));
    compare(&view.path, &mounted.path, &Options::default()).expect_equal();
    let written = std::fs::write(mounted.path.join("app/new"), "x").map_err(|error| error.kind());
    assert_eq!(written, Err(std::io::ErrorKind::ReadOnlyFilesystem));
    assert!(mounted.stop(), "SIGTERM does not unmount and end it with 0");
}

#[test]
fn mount_shows_an_image_of_a_registry() {
    let stage = Stage::new("mount_shows_an_image_of_a_registry", Generation::One);
    let reference = stage.push(&ordinary(Flavour::Docker, Compression::Gzip), "demo/app:1");
    stage.containerd.pull(&reference, REFERENCE).expect_success();
    let view = stage.containerd.view(&reference, REFERENCE);
    let mounted = Mounted::new(&stage.sandbox, &reference);
    compare(&view.path, &mounted.path, &Options::default()).expect_equal();
    assert!(mounted.stop(), "SIGTERM does not unmount and end it with 0");
}

#[test]
fn status_names_images_and_layers() {
    if subject() != lazuli::SNAPSHOTTER {
        return;
    }
    let stage = Stage::new("status_names_images_and_layers", Generation::One);
    let image = ordinary(Flavour::Oci, Compression::Gzip);
    let reference = stage.push(&image, "demo/app:1");
    stage.pull(&reference);
    let lazuli = stage.lazuli.as_ref().unwrap();
    let status = lazuli.status().to_string();
    for layer in &image.layers {
        assert!(
            status.contains(&layer.blob.digest),
            "status does not name {}: {status}",
            layer.blob.digest
        );
    }
    let text = run(&mut lazuli.command("status", &[]), PATIENCE)
        .expect_success()
        .text();
    assert!(
        text.contains("demo/app") || text.contains(&image.layers[0].blob.digest["sha256:".len()..][..12]),
        "{text}"
    );
}

/// Runs `lazuli` with these arguments.
fn lazuli(arguments: &[&str]) -> crate::support::sandbox::Finished {
    run(Command::new(lazuli::program()).args(arguments), COMMAND_TIMEOUT)
}

#[test]
fn errors_say_what_and_where() {
    let sandbox = Sandbox::new("errors_say_what_and_where");
    let config = sandbox.path("bad.toml");
    let path = config.display().to_string();
    std::fs::write(&config, "root = \"/tmp/x\"\nrot = 1\n").unwrap();
    let wrong = lazuli(&["check-config", "--config", &path]);
    assert!(!wrong.success());
    assert!(
        wrong.stderr.contains("bad.toml") && wrong.stderr.contains("rot") && wrong.stderr.contains('2'),
        "{}",
        wrong.describe()
    );
    assert!(!wrong.stderr.contains("panicked"), "{}", wrong.describe());

    let root = sandbox.path("root").display().to_string();
    std::fs::write(&config, format!("root = {root:?}\naddress = \"{root}/no.sock\"\ncontainerd_address = \"{root}/c.sock\"\nadmin_address = \"\"\n")).unwrap();
    assert!(lazuli(&["check-config", "--config", &path]).success());

    let nobody = lazuli(&["status", "--config", &path]);
    assert!(!nobody.success());
    assert!(
        nobody.stderr.contains("no.sock") || nobody.stderr.contains(&root),
        "{}",
        nobody.describe()
    );

    let pull = lazuli(&["pull", "--config", &path, "127.0.0.1:1/demo/app:1"]);
    assert!(!pull.success());
    assert!(pull.stderr.contains("127.0.0.1:1"), "{}", pull.describe());
    let registry = Registry::start(&sandbox);
    let reference = registry.push(&ordinary(Flavour::Oci, Compression::Gzip), "demo/app:1");
    let pull = lazuli(&["pull", "--config", &path, &reference]);
    assert!(!pull.success());
    assert!(
        pull.stderr.contains("c.sock"),
        "the containerd that is not there has no name: {}",
        pull.describe()
    );
    let pull = lazuli(&["pull", "--config", &path, &reference.replace("app:1", "app:2")]);
    assert!(!pull.success());
    assert!(pull.stderr.contains("demo/app:2"), "{}", pull.describe());

    let missing = sandbox.path("nothing-here").display().to_string();
    let target = sandbox.dir("target").display().to_string();
    let mount = lazuli(&["mount", "--config", &path, &format!("oci:{missing}"), &target]);
    assert!(!mount.success());
    assert!(mount.stderr.contains("nothing-here"), "{}", mount.describe());

    for arguments in [
        &["--help"][..],
        &["serve", "--help"],
        &["pull", "--help"],
        &["mount", "--help"],
        &["status", "--help"],
    ] {
        let help = lazuli(arguments);
        assert!(help.success() && help.text().len() > 200, "{}", help.describe());
    }
    assert!(!lazuli(&["no-such-command"]).success());
}
