//! Directories of hosts: which is taken, and what is made of it.

use std::fs;

use super::*;

fn table(roots: &[&Path]) -> HostTable {
    HostTable::new(
        &RegistryConfig {
            config_path: roots.iter().map(|root| root.to_path_buf()).collect(),
            plain_http: vec!["plain.example".to_owned()],
            hosts: [("10.0.0.1".to_owned(), vec!["10.0.0.1:5001".to_owned()])].into(),
            ..RegistryConfig::default()
        },
        proxy::Proxies::default(),
    )
}

fn addresses(table: &HostTable, host: &str) -> Vec<String> {
    let endpoints = table.endpoints(host, For::Names).unwrap();
    endpoints
        .iter()
        .map(|endpoint| match &endpoint.namespace {
            Some(namespace) => format!("{} ns={namespace}", endpoint.base),
            None => endpoint.base.to_string(),
        })
        .collect()
}

fn write(root: &Path, dir: &str, text: &str) {
    fs::create_dir_all(root.join(dir)).unwrap();
    fs::write(root.join(dir).join(HOSTS_TOML), text).unwrap();
}

#[test]
fn without_files_the_registry_itself_is_asked() {
    let table = table(&[Path::new("/nonexistent")]);
    for (host, address) in [
        ("docker.io", "https://registry-1.docker.io/v2"),
        ("registry.example", "https://registry.example/v2"),
        ("registry.example:5000", "https://registry.example:5000/v2"),
        ("localhost:5000", "http://localhost:5000/v2"),
        ("127.0.0.1:5000", "http://127.0.0.1:5000/v2"),
        ("[::1]:5000", "http://[::1]:5000/v2"),
        ("plain.example", "http://plain.example/v2"),
    ] {
        assert_eq!(addresses(&table, host), [address], "{host}");
    }
    assert!(table.endpoints("a/b@c", For::Names).is_err());
    assert!(table.endpoints("", For::Names).is_err());
}

#[test]
fn directories_are_searched_in_containerds_order() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let table = table(&[one.path(), two.path()]);
    write(two.path(), "_default", r#"[host."https://default.example"]"#);
    assert_eq!(
        addresses(&table, "r.example:5000"),
        [
            "https://default.example/v2 ns=r.example:5000",
            "https://r.example:5000/v2"
        ]
    );
    write(two.path(), "r.example:5000", r#"server = "https://colon.example""#);
    assert_eq!(
        addresses(&table, "r.example:5000"),
        ["https://colon.example/v2 ns=r.example:5000"]
    );
    write(
        two.path(),
        "r.example_5000_",
        r#"server = "https://underscore.example""#,
    );
    assert_eq!(
        addresses(&table, "r.example:5000"),
        ["https://underscore.example/v2 ns=r.example:5000"]
    );
    // The first root wins, even with its default.
    write(one.path(), "_default", r#"server = "https://first.example""#);
    assert_eq!(
        addresses(&table, "r.example:5000"),
        ["https://first.example/v2 ns=r.example:5000"]
    );
}

#[test]
fn a_changed_file_is_read_again_and_a_broken_one_is_an_error() {
    let root = tempfile::tempdir().unwrap();
    let table = table(&[root.path()]);
    write(root.path(), "docker.io", "");
    assert_eq!(addresses(&table, "docker.io"), ["https://registry-1.docker.io/v2"]);
    write(root.path(), "docker.io", r#"[host."https://m.example"]"#);
    assert_eq!(
        addresses(&table, "docker.io"),
        ["https://m.example/v2 ns=docker.io", "https://registry-1.docker.io/v2"]
    );
    write(root.path(), "docker.io", "\nserver = [");
    let error = table.endpoints("docker.io", For::Names).unwrap_err();
    assert!(matches!(error, RegistryError::Config { .. }));
    let text = error.to_string();
    assert!(text.contains("hosts.toml") && text.contains("line 2"), "{text}");
    write(
        root.path(),
        "docker.io",
        "[host.\"https://m.example\"]\nca = \"missing.crt\"\n",
    );
    let text = table.endpoints("docker.io", For::Names).unwrap_err().to_string();
    assert!(text.contains("missing.crt"), "{text}");
}

#[test]
fn endpoints_with_the_same_identity_share_their_connections() {
    let root = tempfile::tempdir().unwrap();
    let table = table(&[root.path()]);
    write(
        root.path(),
        "r.example",
        "[host.\"https://a.example\"]\n[host.\"https://b.example\"]\n[host.\"https://c.example\"]\nskip_verify = true\n",
    );
    table.endpoints("r.example", For::Names).unwrap();
    assert_eq!(table.clients.len(), 2);
}

#[test]
fn readers_that_come_at_once_share_one_look_up() {
    let table = table(&[Path::new("/nonexistent")]);
    let found: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| table.fresh("r.example", For::Names).unwrap()))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(found.iter().all(|endpoints| Arc::ptr_eq(endpoints, &found[0])));
}

#[test]
fn ports_are_found_again() {
    let root = tempfile::tempdir().unwrap();
    for name in [
        "127.0.0.1:5000",
        "127.0.0.1_6000_",
        "127.0.0.1_backup_",
        "127.0.0.11:7000",
    ] {
        fs::create_dir(root.path().join(name)).unwrap();
    }
    let table = table(&[root.path()]);
    assert_eq!(
        table.resolve_ports("127.0.0.1"),
        ["127.0.0.1:5000", "127.0.0.1:6000", "127.0.0.1"]
    );
    assert_eq!(table.resolve_ports("10.0.0.1"), ["10.0.0.1:5001", "10.0.0.1"]);
}
