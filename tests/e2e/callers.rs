//! Callers that are not a pull and not a container of CRI's: mounts by path, image volumes, directories as root file systems, commits of containers; on a
//! lazy image each.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::stage::{Stage, generations, subject};
use crate::support::containerd::Generation;
use crate::support::image::{Compression, Flavour, ordinary};
use crate::support::sandbox::{COMMAND_TIMEOUT, run, run_ok};

/// A lazy image, and both containerds.
fn for_each(name: &str, check: impl Fn(&Stage, &str)) {
    for generation in generations() {
        let stage = Stage::new(name, generation);
        let image = ordinary(Flavour::Oci, Compression::Gzip);
        let reference = stage.push_converted(&image, "callers/this:1", &["--estargz"]);
        stage.pull(&reference);
        check(&stage, &reference);
    }
}

/// The image is mounted there, writable, by a snapshot with this key, and more options of the overlay; `use_it` sees it.
fn with_mounted(stage: &Stage, reference: &str, key: &str, options: &str, use_it: impl FnOnce(&Path)) {
    let top = stage.containerd.chain_ids(reference).pop().unwrap();
    let snapshots = ["snapshots", "--snapshotter", &subject()];
    stage
        .containerd
        .ctr_ok(&[&snapshots[..], &["prepare", key, &top]].concat());
    stage.containerd.mark_snapshot(&subject(), key);
    let target: PathBuf = stage.sandbox.dir("mounted");
    let path = target.to_str().unwrap();
    let printed = stage
        .containerd
        .ctr_ok(&[&snapshots[..], &["mounts", path, key]].concat())
        .text();
    let mount = printed.trim().replacen(" -o ", &format!(" -o {options}"), 1);
    run_ok(Command::new("sh").args(["-c", &mount]));
    let used = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| use_it(&target)));
    run_ok(Command::new("umount").arg(&target));
    if let Err(panic) = used {
        std::panic::resume_unwind(panic);
    }
    stage.containerd.ctr_ok(&[&snapshots[..], &["rm", key]].concat());
}

/// `ctr images mount`: the key of its snapshot is the path. (That of 1.6 knows no other snapshotter than the default one.)
#[test]
fn an_image_is_mounted_by_path() {
    for_each("an_image_is_mounted_by_path", |stage, reference| {
        if stage.containerd.generation == Generation::One {
            return;
        }
        let target = stage.sandbox.dir("mounted");
        let path = target.to_str().unwrap();
        let mount = ["images", "mount", "--snapshotter", &subject(), reference, path];
        stage.containerd.ctr_ok(&mount);
        let group = std::fs::read_to_string(target.join("etc/group"));
        let unmount = ["images", "unmount", "--snapshotter", &subject(), "--rm", path];
        stage.containerd.ctr_ok(&unmount);
        assert!(group.unwrap().starts_with("root:x:0:"));
        assert_eq!(std::fs::read_dir(&target).unwrap().count(), 0, "it is still mounted");
    });
}

/// An image volume of Kubernetes: Prepare with a path of the host as its key, and `volatile` among the options of the overlay.
#[test]
fn an_image_is_a_volume() {
    for_each("an_image_is_a_volume", |stage, reference| {
        let key = format!("/var/lib/kubelet/pods/{}/volumes/image", stage.containerd.new_id());
        with_mounted(stage, reference, &key, "volatile,", |path| {
            std::fs::write(path.join("new"), "new").unwrap();
            assert!(
                std::fs::read_to_string(path.join("etc/group"))
                    .unwrap()
                    .starts_with("root:x:0:")
            );
        });
    });
}

/// `ctr run --rootfs` on a directory that shows the image.
#[test]
fn an_image_is_a_directory_that_a_container_runs_in() {
    for_each("an_image_is_a_directory", |stage, reference| {
        let (key, id) = (stage.containerd.new_id(), stage.containerd.new_id());
        with_mounted(stage, reference, &key, "", |path| {
            let flags = ["run", "--rm", "--null-io", "--rootfs", path.to_str().unwrap(), &id];
            let mut command = stage.containerd.ctr(&flags);
            // Without an image there is no environment either.
            let script = "export PATH=/bin:/usr/bin; grep -q ^root:x:0: /etc/group && echo seen > /seen";
            command.args(["/bin/sh", "-c", script]);
            run(&mut command, COMMAND_TIMEOUT).expect_success();
            assert_eq!(std::fs::read_to_string(path.join("seen")).unwrap(), "seen\n");
        });
    });
}

/// What `nerdctl commit` and builders do: the difference between a container and its image, which is read through Lazuli's mounts.
#[test]
fn a_container_is_committed() {
    for_each("a_container_is_committed", |stage, reference| {
        let container = stage.containerd.start_container(reference, &subject());
        let script = "echo new > /app/new; rm /app/data/middle.bin";
        stage.containerd.exec(&container, script).expect_success();
        let flags = ["snapshots", "--snapshotter", &subject(), "diff", &container];
        let layer = stage.sandbox.path("layer.tar.gz");
        std::fs::write(&layer, stage.containerd.ctr_ok(&flags).stdout).unwrap();
        let listed = run_ok(Command::new("tar").arg("-tzf").arg(&layer)).text();
        let mut names: Vec<&str> = listed.lines().filter(|name| !name.ends_with('/')).collect();
        names.sort_unstable();
        assert_eq!(names, ["app/data/.wh.middle.bin", "app/new"], "{listed}");
        stage.containerd.remove_container(&container);
    });
}
