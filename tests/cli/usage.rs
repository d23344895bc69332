//! What is wrong with a command line is exit code 2, however late it is found; what is wrong with the world is not.

use crate::rig::Rig;

#[test]
fn mistakes_of_the_command_line_are_exit_code_2() {
    let rig = Rig::new();
    let digest = "a".repeat(64);
    for (line, word) in [
        ("pull Not-A-Reference", "Not-A-Reference"),
        ("pull a@sha256:12", "a@sha256:12"),
        ("pull --namespace a..b REF", "a..b"),
        ("mount a@sha256:12 DIR/mountpoint", "a@sha256:12"),
        ("mount oci: DIR/mountpoint", "oci:"),
        ("mount REF", "MOUNTPOINT"),
        ("index build r.example/UPPER -o DIR/out", "r.example/UPPER"),
        ("index pull Bad: -o DIR/out", "Bad:"),
        ("index rm Bad:", "Bad:"),
        ("index push REF --repository r.example/a:tag", "neither tag nor digest"),
        ("index ls --repository r.example/a@x", "neither tag nor digest"),
        ("index ls", "--repository"),
        ("index export REF --soci v1", "--push"),
        ("index export REF --soci v3 -o DIR/out", "v3"),
        ("index export REF --soci v2 -o DIR/out --push Bad:", "Bad:"),
        ("index export REF --soci v2 -o DIR/out --span-size 1", "1"),
        (
            &format!("index export REF --soci v2 --push r.example/a@sha256:{digest}"),
            "name a tag",
        ),
        ("serve --log-level ===", "log.level"),
        ("serve --root relative", "root"),
        ("status --frobnicate", "--frobnicate"),
    ] {
        let finished = rig.run(line);
        assert_eq!(
            finished.status.and_then(|s| s.code()),
            Some(2),
            "{line}: {}",
            finished.describe()
        );
        assert!(finished.stderr.contains(word), "{line}: {}", finished.describe());
        assert!(finished.stdout.is_empty(), "{line}: {}", finished.describe());
    }
    assert_eq!(
        rig.registry.log().len(),
        0,
        "mistakes are found before anybody is asked"
    );
}

#[test]
fn what_is_missing_is_exit_code_1() {
    let rig = Rig::new();
    std::fs::create_dir(rig.path("loop")).unwrap();
    std::os::unix::fs::symlink("oci-layout", rig.path("loop/oci-layout")).unwrap();
    for (line, word) in [
        ("mount oci:DIR/none DIR/mountpoint", "none"),
        ("mount REF DIR/none", "none"),
        ("index build oci:DIR/loop -o DIR/out", "cannot read"),
        ("index inspect DIR/none", "none"),
        ("index push REF --from DIR/none", "none"),
        ("index push REF --signing-key DIR/none", "none"),
        ("index build REF:2 -o DIR/out", "REF:2"),
    ] {
        let line = line.replace("REF:2", &rig.reference.replace(":1", ":2"));
        let word = word.replace("REF:2", "demo/app:2");
        let finished = rig.run(&line);
        assert_eq!(
            finished.status.and_then(|s| s.code()),
            Some(1),
            "{line}: {}",
            finished.describe()
        );
        assert!(finished.stderr.contains(&word), "{line}: {}", finished.describe());
    }
    assert_eq!(rig.left(), Vec::<String>::new());
}
