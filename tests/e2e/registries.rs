//! Registries as people really run them, under a container that reads: what can be recovered never reaches it as an error.
//!
//! Each trouble comes while the container runs, meets files that are not in the cache, and the longest stall is printed.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;

use crate::stage::{Stage, subject};
use crate::support::containerd::{Containerd, Generation, REFERENCE};
use crate::support::fault_registry::{Auth, Fault, FaultRegistry, On};
use crate::support::image::{Compression, Flavour, Image, Layer, base_entries, digest_of, ordinary};
use crate::support::lazuli::{self, Lazuli, SNAPSHOTTER};
use crate::support::nginx::{Certificate, Nginx, free_address};
use crate::support::proxy::{Link, Proxy};
use crate::support::registry::Registry;
use crate::support::sandbox::{PATIENCE, Process, Sandbox, listens_tcp, require_program, run, wait_until};
use crate::support::tar::{Entry, noise};
use crate::support::tree::{Options, compare};

/// Bytes of each file: more than what is read of the end of a layer to find its index.
const LENGTH: usize = 1_500_000;
/// Files, each in a layer of its own.
const FILES: usize = 8;
/// More faults than any number of retries.
const ALWAYS: usize = 1_000_000;
/// How long a trouble lasts that somebody mends.
const MENDED_AFTER: Duration = Duration::from_secs(5);
/// Longest time of a read: longer than any outage that a read waits for, since the deadline has to end it, and not this.
const READ_TIMEOUT: Duration = Duration::from_secs(1_200);
/// How long a registry is away: longer than all attempts of one request. `LAZULI_OUTAGE_SECONDS` makes it another time.
const AWAY: Duration = Duration::from_secs(10);

fn content(index: usize) -> Vec<u8> {
    noise(7_000 + index as u64, LENGTH)
}

/// A base that can run `sh`, and layers of one file that does not compress.
fn image() -> Image {
    let mut layers = vec![Layer::of(Compression::Gzip, base_entries())];
    layers.extend((0..FILES).map(|index| {
        let dir = Entry::dir(format!("data/d{index}"));
        let file = Entry::file(format!("data/d{index}/file"), content(index));
        Layer::of(Compression::Gzip, [Entry::dir("data"), dir, file])
    }));
    Image::new(Flavour::Oci, layers)
}

/// A container that runs on a lazy image of a registry that can be made to fail.
struct Reading {
    containerd: Containerd,
    lazuli: Lazuli,
    registry: FaultRegistry,
    sandbox: Sandbox,
    container: String,
    next: usize,
    longest: Duration,
    _runtime: tokio::runtime::Runtime,
}

impl Reading {
    fn new(name: &str, auth: Auth) -> Self {
        let image = Stage::new(&format!("{name}: conversion"), Generation::One).converted(&image(), &["--estargz"]);
        let sandbox = Sandbox::new(name);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let registry = runtime.block_on(FaultRegistry::start());
        for blob in image.blobs() {
            registry.add_blob(blob.bytes.as_slice().to_vec());
        }
        let manifest = registry.add_manifest(image.media_type, image.manifest.bytes.as_slice().to_vec());
        registry.tag("demo/app", "1", manifest);
        if let Auth::Basic(user, password) | Auth::Token(user, password) = &auth {
            write_config_json(&sandbox, &registry.host(), user, password);
        }
        registry.set_auth(auth);
        let hosts = sandbox.dir("certs.d").join(registry.host());
        std::fs::create_dir_all(&hosts).unwrap();
        std::fs::write(
            hosts.join("hosts.toml"),
            format!("server = \"http://{}\"\n", registry.host()),
        )
        .unwrap();
        let config = format!("docker_config = {:?}\n", sandbox.path("config.json"));
        let containerd = Containerd::start(&sandbox, Generation::One, &lazuli::address_in(&sandbox));
        let lazuli = Lazuli::start(&sandbox, &containerd.address, &[registry.host()], &config);
        let reference = format!("{}/demo/app:1", registry.host());
        lazuli.pull(&reference).expect_success();
        let container = containerd.start_container(&reference, SNAPSHOTTER);
        let reading = Reading {
            containerd,
            lazuli,
            registry,
            sandbox,
            container,
            next: 0,
            longest: Duration::ZERO,
            _runtime: runtime,
        };
        // What the shell needs is here from now on.
        let warm = reading.containerd.exec(&reading.container, "sha256sum /etc/passwd");
        warm.expect_success();
        reading
    }

    /// The container reads the next file, which nobody has read before, while `meanwhile` happens.
    fn reads(&mut self, trouble: &str, meanwhile: impl FnOnce(&Self) + Send) {
        let index = self.next;
        self.next += 1;
        let asked = self.registry.log().len();
        let begun = Instant::now();
        let read = thread::scope(|scope| {
            let this = &*self;
            let read = scope.spawn(move || {
                let script = format!("sha256sum < /data/d{index}/file");
                let read = this.containerd.exec_within(&this.container, &script, READ_TIMEOUT);
                (read, begun.elapsed())
            });
            meanwhile(this);
            read.join().unwrap()
        });
        let (read, took) = read;
        println!("{trouble}: read after {:.1} s", took.as_secs_f64());
        self.longest = self.longest.max(took);
        assert!(read.success(), "{trouble}: {}\n{}", read.describe(), self.lazuli.log());
        let sum = digest_of(&content(index));
        assert_eq!(
            read.text().split_whitespace().next(),
            Some(&sum["sha256:".len()..]),
            "{trouble}: wrong bytes"
        );
        assert!(
            self.registry.log().len() > asked || trouble.contains("mirror"),
            "{trouble}: met nothing"
        );
    }

    fn hosts_toml(&self) -> PathBuf {
        self.sandbox
            .path("certs.d")
            .join(self.registry.host())
            .join("hosts.toml")
    }

    /// Names a mirror to be asked first; the daemon looks at the file once a second.
    fn set_mirror(&self, mirror: Option<&str>) {
        let mut text = format!("server = \"http://{}\"\n", self.registry.host());
        if let Some(mirror) = mirror {
            text.push_str(&format!("[host.\"http://{mirror}\"]\n"));
        }
        std::fs::write(self.hosts_toml(), text).unwrap();
        thread::sleep(Duration::from_millis(1_500));
    }
}

fn write_config_json(sandbox: &Sandbox, host: &str, user: &str, password: &str) {
    let auth = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
    let text = format!("{{\"auths\": {{\"{host}\": {{\"auth\": \"{auth}\"}}}}}}");
    std::fs::write(sandbox.path("config.json"), text).unwrap();
}

/// A password that ends, and whose successor comes a little later.
#[test]
fn a_container_reads_on_while_its_credentials_end() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let auth = |password: &str| Auth::Basic("someone".to_owned(), password.to_owned());
    let mut stage = Reading::new("a_container_reads_on_while_its_credentials_end", auth("first"));
    stage.reads("no trouble", |_| {});
    for password in ["second", "third"] {
        stage.registry.set_auth(auth(password));
        stage.reads("the password ended, the new one comes later", |stage| {
            thread::sleep(MENDED_AFTER);
            write_config_json(&stage.sandbox, &stage.registry.host(), "someone", password);
        });
    }
    // As a registry says it that gives no challenge with its refusal.
    stage.registry.refuse_with(403);
    stage.registry.set_auth(auth("fourth"));
    write_config_json(&stage.sandbox, &stage.registry.host(), "someone", "fourth");
    stage.reads("the password ended, refused with 403", |_| {});
    println!("longest stall: {:?}", stage.longest);
    assert!(!stage.lazuli.log().contains("fourth"), "a password is in the log");
}

/// A registry that forgets its tokens, redirects whose targets end, a hosts.toml that is being edited, and mirrors of every kind.
#[test]
fn a_container_reads_on_whatever_happens_to_its_registry() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let auth = Auth::Token("someone".to_owned(), "s3cret".to_owned());
    let mut stage = Reading::new("a_container_reads_on_whatever_happens_to_its_registry", auth);
    stage.registry.expire_tokens();
    stage.registry.refuse_with(400);
    stage.reads("the registry has forgotten its tokens, and says 400", |_| {});

    stage.registry.set_redirects(true, None);
    stage.reads("redirects", |_| {});
    stage.registry.expire_redirects();
    stage.reads("the target of the redirect has ended", |_| {});
    stage.registry.set_redirects(false, None);

    let whole = std::fs::read_to_string(stage.hosts_toml()).unwrap();
    std::fs::write(stage.hosts_toml(), &whole[..whole.len() / 2]).unwrap();
    thread::sleep(Duration::from_millis(1_500));
    stage.reads("hosts.toml is half written", |stage| {
        thread::sleep(MENDED_AFTER);
        std::fs::write(stage.hosts_toml(), &whole).unwrap();
    });

    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    stage.set_mirror(Some(&silent.local_addr().unwrap().to_string()));
    stage.reads("the first mirror never answers", |_| {});
    stage.set_mirror(None);

    let other = stage._runtime.block_on(FaultRegistry::start());
    for blob in stage.registry.blobs() {
        other.add_blob(blob);
    }
    other.fail(On::Blob, ALWAYS, Fault::IgnoreRange);
    stage.set_mirror(Some(&other.host()));
    stage.reads("the first mirror ignores ranges", |_| {});
    println!("longest stall: {:?}", stage.longest);
}

/// A registry that is away longer than any one request of it is repeated, in each way in which registries are.
#[test]
fn a_container_reads_on_when_its_registry_has_been_away() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let away = std::env::var("LAZULI_OUTAGE_SECONDS");
    let away = away.map_or(AWAY, |seconds| Duration::from_secs(seconds.parse().expect("seconds")));
    let mut stage = Reading::new("a_container_reads_on_when_its_registry_has_been_away", Auth::None);
    // What is in the cache is read meanwhile as ever.
    let pass = |stage: &Reading| {
        let until = Instant::now() + away;
        let local = stage.containerd.exec(&stage.container, "sha256sum /etc/passwd");
        local.expect_success();
        thread::sleep(until.saturating_duration_since(Instant::now()));
    };
    for fault in [
        Fault::Status(503),
        Fault::RetryAfter(429, "1".to_owned()),
        Fault::Cut(1000),
        Fault::Answer(200, "<html>we are back soon</html>".to_owned()),
    ] {
        stage.registry.fail(On::Blob, ALWAYS, fault.clone());
        stage.reads(&format!("{fault:?} for {} s", away.as_secs()), |stage| {
            pass(stage);
            stage.registry.heal();
        });
    }
    let whole = std::fs::read_to_string(stage.hosts_toml()).unwrap();
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    std::fs::write(stage.hosts_toml(), format!("server = \"http://{nobody}\"\n")).unwrap();
    thread::sleep(Duration::from_millis(1_500));
    stage.reads("connections are refused", |stage| {
        pass(stage);
        std::fs::write(stage.hosts_toml(), &whole).unwrap();
    });
    let log = stage.lazuli.log();
    assert!(log.contains("the host delivers again"), "{log}");
    println!("longest stall: {:?} of {away:?}", stage.longest);
}

/// Eight other repositories name the layers of a running container, and have none of their bytes.
#[test]
fn pulls_from_elsewhere_take_no_source_from_a_running_container() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let mut stage = Reading::new(
        "pulls_from_elsewhere_take_no_source_from_a_running_container",
        Auth::None,
    );
    let other = stage._runtime.block_on(FaultRegistry::start());
    let manifest = stage.registry.tagged("demo/app", "1").unwrap();
    let bytes = stage.registry.manifest(manifest).unwrap();
    let document: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    for blob in stage.registry.blobs() {
        other.add_blob(blob);
    }
    for layer in document["layers"].as_array().unwrap() {
        other.lose(layer["digest"].as_str().unwrap().parse().unwrap());
    }
    other.add_manifest(document["mediaType"].as_str().unwrap(), bytes);
    write_hosts_toml(
        &stage.sandbox,
        &other.host(),
        &format!("server = \"http://{}\"\n", other.host()),
    );
    for at in 0..9 {
        let repository = format!("elsewhere/app{at}");
        other.tag(&repository, "1", manifest);
        stage
            .lazuli
            .pull(&format!("{}/{repository}:1", other.host()))
            .expect_success();
    }
    stage.reads("nine others are named", |_| {});
    // What is known of them is not lost with the daemon, as far as it matters.
    let Reading { lazuli, .. } = &mut stage;
    assert!(lazuli.stop());
    lazuli.restart();
    wait_until(PATIENCE, || {
        stage.containerd.snapshots(SNAPSHOTTER).len().checked_sub(1)
    });
    let view = stage
        .containerd
        .view(&format!("{}/demo/app:1", stage.registry.host()), SNAPSHOTTER);
    let read = run(
        Command::new("cat").arg(view.path.join(format!("data/d{}/file", stage.next))),
        Duration::from_secs(60),
    );
    assert!(read.success() && read.stdout == content(stage.next), "{}", read.stderr);
}

/// A second `docker-registry` on the storage of another, with TLS.
struct TlsRegistry {
    address: SocketAddr,
    _process: Process,
}

impl TlsRegistry {
    fn start(sandbox: &Sandbox, name: &str, with: &Certificate) -> Self {
        let address = free_address();
        let config = sandbox.path(format!("{name}.yml"));
        let text = format!(
            "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}/data\n  maintenance:\n    uploadpurging:\n      enabled: false\n\
             http:\n  addr: {address}\n  secret: test\n  tls:\n    certificate: {}\n    key: {}\n",
            sandbox.path("registry").display(),
            with.certificate.display(),
            with.key.display(),
        );
        std::fs::write(&config, text).unwrap();
        let mut command = Command::new(require_program("docker-registry"));
        command.arg("serve").arg(&config);
        let mut process = sandbox.spawn(name, &mut command);
        process.wait_ready("its port", PATIENCE, |_| listens_tcp(address));
        TlsRegistry {
            address,
            _process: process,
        }
    }
}

/// `hosts.toml` of `host`.
fn write_hosts_toml(sandbox: &Sandbox, host: &str, text: &str) -> PathBuf {
    let dir = sandbox.dir("certs.d").join(host);
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("hosts.toml"), text).unwrap();
    dir
}

fn copy(file: &Path, dir: &Path, name: &str) {
    std::fs::copy(file, dir.join(name)).unwrap();
}

/// Debian's docker-registry behind certificates that its owner made with one command, and nginx that wants one of its clients.
#[test]
fn registries_behind_tls_with_certificates_of_their_own() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let sandbox = Sandbox::new("registries_behind_tls_with_certificates_of_their_own");
    let registry = Registry::start(&sandbox);
    registry.push(&ordinary(Flavour::Oci, Compression::Gzip), "demo/app:1");
    let made = sandbox.dir("made");
    let rsa = Certificate::signed_by_itself(&made, "rsa", &["rsa:2048"]);
    let p521 = Certificate::signed_by_itself(&made, "p521", &["ec", "-pkeyopt", "ec_paramgen_curve:P-521"]);
    let client = Certificate::signed_by_itself(&made, "client", &["ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]);
    let (one, two) = (
        TlsRegistry::start(&sandbox, "rsa", &rsa),
        TlsRegistry::start(&sandbox, "p521", &p521),
    );
    let wants_client = free_address();
    let servers = format!(
        "server {{ listen {wants_client} ssl; ssl_certificate {}; ssl_certificate_key {}; ssl_client_certificate {}; ssl_verify_client on;\n\
         location / {{ proxy_pass http://{}; proxy_set_header Host $http_host; }} }}\n",
        rsa.certificate.display(),
        rsa.key.display(),
        client.certificate.display(),
        registry.address,
    );
    let _nginx = Nginx::start(&sandbox, "nginx", &servers, &[wants_client]);
    // By hosts.toml, and docker's way: certificates in the directory.
    let dir = write_hosts_toml(
        &sandbox,
        &one.address.to_string(),
        &format!("server = \"https://{}\"\nca = \"mine.crt\"\n", one.address),
    );
    copy(&rsa.certificate, &dir, "mine.crt");
    let dir = sandbox.dir("certs.d").join(two.address.to_string());
    std::fs::create_dir_all(&dir).unwrap();
    copy(&p521.certificate, &dir, "ca.crt");
    let dir = write_hosts_toml(
        &sandbox,
        &wants_client.to_string(),
        &format!(
            "server = \"https://{wants_client}\"\nca = \"ca.crt\"\nclient = [[\"client.cert\", \"client.key\"]]\n"
        ),
    );
    copy(&rsa.certificate, &dir, "ca.crt");
    copy(&client.certificate, &dir, "client.cert");
    copy(&client.key, &dir, "client.key");

    let containerd = Containerd::start(&sandbox, Generation::One, &lazuli::address_in(&sandbox));
    let hosts = [one.address, two.address, wants_client].map(|address| address.to_string());
    let lazuli = Lazuli::start(&sandbox, &containerd.address, &hosts, "");
    for host in hosts {
        let reference = format!("{host}/demo/app:1");
        let pull = lazuli.pull(&reference);
        assert!(pull.success(), "{host}: {}\n{}", pull.describe(), lazuli.log());
        let lines = containerd.sh(&reference, SNAPSHOTTER, "sha256sum < /app/data/middle.bin");
        let sum = digest_of(&noise(1_500_000, 1_500_000));
        assert_eq!(lines.split_whitespace().next(), Some(&sum["sha256:".len()..]), "{host}");
        containerd.remove_image(&reference);
    }
}

/// nginx in front of docker-registry: redirects to a place that ignores ranges, claims encodings, or both.
#[test]
fn nginx_before_a_registry_with_its_quirks() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let stage = Stage::new("nginx_before_a_registry_with_its_quirks", Generation::One);
    let plain = stage.push(&ordinary(Flavour::Oci, Compression::Gzip), "demo/plain:1");
    stage.push_converted(
        &ordinary(Flavour::Oci, Compression::Gzip),
        "demo/lazy:1",
        &["--estargz"],
    );
    stage.containerd.pull(&plain, REFERENCE).expect_success();
    let expected = stage.containerd.view(&plain, REFERENCE);
    let registry = stage.registry.address;
    let quirks = [
        ("redirects", ""),
        ("no ranges", "proxy_set_header Range \"\"; max_ranges 0;"),
        ("x-gzip", "add_header Content-Encoding x-gzip always;"),
        ("aws-chunked", "add_header Content-Encoding aws-chunked always;"),
        (
            "no ranges, claimed gzip",
            "proxy_set_header Range \"\"; max_ranges 0; add_header Content-Encoding gzip always;",
        ),
        ("no Content-Range", "proxy_hide_header Content-Range;"),
    ];
    let mut fronts = Vec::new();
    let mut servers = String::new();
    for (quirk, how) in quirks {
        let (front, back) = (free_address(), free_address());
        servers.push_str(&format!(
            "server {{ listen {front};\n\
             location ~ ^/v2/.*/blobs/sha256: {{ return 302 http://{back}$request_uri; }}\n\
             location / {{ proxy_pass http://{registry}; proxy_set_header Host $http_host; }} }}\n\
             server {{ listen {back}; location / {{ proxy_pass http://{registry}; {how} }} }}\n"
        ));
        fronts.push((quirk, front, back));
    }
    let addresses: Vec<SocketAddr> = fronts.iter().flat_map(|(_, front, back)| [*front, *back]).collect();
    let _nginx = Nginx::start(&stage.sandbox, "nginx", &servers, &addresses);
    for (quirk, front, _) in fronts {
        for name in ["demo/lazy:1", "demo/plain:1"] {
            // A namespace and a daemon of their own: nothing is there already.
            let sandbox = stage.sandbox.machine(&format!("{}-{}", front.port(), &name[5..9]));
            let containerd = Containerd::start(&sandbox, Generation::One, &lazuli::address_in(&sandbox));
            let lazuli = Lazuli::start(&sandbox, &containerd.address, &[front.to_string()], "");
            let reference = format!("{front}/{name}");
            let pull = lazuli.pull(&reference);
            assert!(pull.success(), "{quirk}, {name}: {}\n{}", pull.describe(), lazuli.log());
            let view = containerd.view(&reference, SNAPSHOTTER);
            println!("{quirk}, {name}");
            let options = Options {
                ignored_root_names: ["stargz.index.json", ".no.prefetch.landmark"].map(str::to_owned).into(),
                whole_seconds: true,
                ..Options::default()
            };
            compare(&expected.path, &view.path, &options).expect_equal();
        }
    }
}

/// What each connection has of a link, in bytes per second, and bytes of the layer that comes over it.
const EACH: usize = 3_000_000;
const LAYER: usize = 20_000_000;

/// A store that holds back each connection, and offers HTTP/2: a layer comes over several connections, which that would not be.
#[test]
fn a_layer_comes_over_several_connections_where_each_is_held_back() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let sandbox = Sandbox::new("a_layer_comes_over_several_connections_where_each_is_held_back");
    let registry = Registry::start(&sandbox);
    let layers = [
        Layer::of(Compression::Gzip, base_entries()),
        Layer::of(Compression::Gzip, [Entry::file("large", noise(77, LAYER))]),
    ];
    registry.push(&Image::new(Flavour::Oci, layers.into()), "demo/app:1");
    let own = Certificate::signed_by_itself(&sandbox.dir("made"), "own", &["rsa:2048"]);
    let front = free_address();
    let servers = format!(
        "server {{ listen {front} ssl http2; ssl_certificate {}; ssl_certificate_key {};\n\
         location / {{ proxy_pass http://{}; proxy_set_header Host $http_host; proxy_buffering on; proxy_max_temp_file_size 0; limit_rate {EACH}; }} }}\n",
        own.certificate.display(),
        own.key.display(),
        registry.address,
    );
    let _nginx = Nginx::start(&sandbox, "nginx", &servers, &[front]);
    let toml = format!("server = \"https://{front}\"\nca = \"ca.crt\"\n");
    let dir = write_hosts_toml(&sandbox, &front.to_string(), &toml);
    copy(&own.certificate, &dir, "ca.crt");
    let containerd = Containerd::start(&sandbox, Generation::One, &lazuli::address_in(&sandbox));
    let lazuli = Lazuli::start(&sandbox, &containerd.address, &[front.to_string()], "");
    let reference = format!("{front}/demo/app:1");
    lazuli.pull(&reference).expect_success();
    let lines = containerd.sh(&reference, SNAPSHOTTER, "sha256sum < /large");
    let sum = digest_of(&noise(77, LAYER));
    assert_eq!(lines.split_whitespace().next(), Some(&sum["sha256:".len()..]));
    let log = std::fs::read_to_string(sandbox.path("nginx.access")).unwrap();
    let answers = |protocol: &str, status: &str| {
        let end = format!("{protocol}\" {status} ");
        log.lines()
            .filter(|line| line.contains("/blobs/") && line.contains(&end))
            .count()
    };
    assert!(
        answers("HTTP/2.0", "200") >= 2,
        "the layers are asked for as wholes:\n{log}"
    );
    let ranges = answers("HTTP/1.1", "206");
    // How many there are, and how long, depends on how fast the machine is.
    assert!(ranges >= 1, "no range over a connection of its own:\n{log}");
}

/// A pull-through cache that has nothing yet: it ignores ranges until it has the blob.
#[test]
fn a_cold_pull_through_cache_costs_about_one_blob() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let stage = Stage::new("a_cold_pull_through_cache_costs_about_one_blob", Generation::One);
    let image = ordinary(Flavour::Oci, Compression::Gzip);
    stage.push_converted(&image, "demo/lazy:1", &["--estargz"]);
    let cold = free_address();
    let servers = format!(
        "server {{ listen {cold}; location / {{ proxy_pass http://{}; proxy_set_header Host $http_host; proxy_set_header Range \"\"; max_ranges 0; }} }}\n",
        stage.registry.address
    );
    let _nginx = Nginx::start(&stage.sandbox, "nginx", &servers, &[cold]);
    let counting = Proxy::start(cold, Link::default());
    let sandbox = stage.sandbox.machine("cold");
    let containerd = Containerd::start(&sandbox, Generation::One, &lazuli::address_in(&sandbox));
    let lazuli = Lazuli::start(&sandbox, &containerd.address, &[counting.host()], "");
    let reference = format!("{}/demo/lazy:1", counting.host());
    lazuli.pull(&reference).expect_success();
    let lines = containerd.sh(
        &reference,
        SNAPSHOTTER,
        "cat /app/data/*.bin /app/lib/*/* | wc -c; sha256sum < /app/data/large.bin",
    );
    let sum = digest_of(&noise(9_000_001, 9_000_001));
    assert!(lines.contains(&sum["sha256:".len()..]), "{lines}");
    let manifest = containerd.manifest(&reference);
    let layers = manifest["layers"].as_array().unwrap();
    let whole: u64 = layers.iter().map(|layer| layer["size"].as_u64().unwrap()).sum();
    let moved: u64 = counting
        .exchanges()
        .iter()
        .filter(|e| e.is_blob())
        .map(|e| e.bytes)
        .sum();
    println!("{moved} bytes for layers of {whole}");
    assert!(
        moved * 10 <= whole * 13,
        "{moved} bytes were moved for layers of {whole}"
    );
}
