use crate::support::{self, containerd::*, lazuli, registry::Registry, sandbox::Sandbox, torture, tree::*};
#[test]
fn reference() {
    let sandbox = Sandbox::new("harness");
    let registry = Registry::start(&sandbox);
    let containerd = Containerd::start(&sandbox, Generation::One, &lazuli::address_in(&sandbox));
    for case in torture::all() {
        let t=std::time::Instant::now();
        let reference = registry.push(&case.image, &format!("torture/{}:1", case.name));
        let f = containerd.pull(&reference, REFERENCE);
        if !f.success() { println!("{} FAILED {}", case.name, f.stderr); continue; }
        let a = containerd.view(&reference, REFERENCE);
        let c = compare(&a.path, &a.path, &Options::default());
        println!("{} ok {:?} {} {}", case.name, t.elapsed(), c.entries, c.differences.len());
        let t = support::sandbox::run_ok(std::process::Command::new("sh").arg("-c").arg(format!("cd {} && ls -laR --time-style=full-iso | head -150; getfattr -d -R -h -m - . | head -60", a.path.display())));
        std::fs::write(format!("/tmp/ref-{}.txt", case.name), t.stdout).unwrap();
        assert!(containerd.log().find("level=error").is_none(), "{}", containerd.log());
    }
}
