//! Ranks as processes: started by the launcher or with torchrun's variables, killed, stopped and told to stop. This
//! test binary starts itself again as a rank and as the launcher.
#![cfg(target_os = "linux")]

use std::fs;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU16, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ddpm_cuda::distributed::{Control, Joining, LastResort, Timeouts, World, launch, token};
use ddpm_cuda::error::Result;
use tempfile::TempDir;

/// What this binary is when a test starts it: `rank` or `launcher`.
const ROLE: &str = "DDPM_TEST_ROLE";
/// A folder for what ranks tell the test: R.pid, R.done (the last step), R.end (exit code and sentence).
const OUT: &str = "DDPM_TEST_OUT";
/// How many steps there are, and milliseconds of each.
const STEPS: &str = "DDPM_TEST_STEPS";
const PACE: &str = "DDPM_TEST_PACE";
/// `WHAT RANK STEP`: what a rank does in a step.
const TASK: &str = "DDPM_TEST_TASK";

/// The signal that this rank was sent.
static SIGNAL: AtomicI32 = AtomicI32::new(0);

extern "C" fn note_signal(number: i32) {
    SIGNAL.store(number, Ordering::SeqCst);
}

#[test]
fn role() {
    let code = match std::env::var(ROLE).as_deref() {
        Ok("launcher") if std::env::var("RANK").is_err() => match launch::launch(4) {
            Ok(ended) => {
                ended.words.iter().for_each(|line| eprintln!("launcher: {line}"));
                i32::from(ended.code)
            }
            Err(e) => {
                eprintln!("launcher: {e}");
                99
            }
        },
        Ok(_) => rank(),
        Err(_) => return,
    };
    std::process::exit(code)
}

fn last_resort(why: &str) {
    eprintln!("last resort: {why}");
    std::process::exit(1)
}

fn number(name: &str, otherwise: u32) -> u32 {
    std::env::var(name).map_or(otherwise, |text| text.parse().unwrap())
}

fn rank() -> i32 {
    let mut launched = launch::launched().unwrap();
    let world = World::from_environment(None).unwrap();
    let (rank, out) = (world.rank, PathBuf::from(std::env::var(OUT).unwrap()));
    let tell = |what: &str, text: String| {
        // Renamed, so that whoever reads it finds all of it.
        let path = out.join(format!("{rank}.{what}"));
        fs::write(path.with_extension("new"), text).unwrap();
        fs::rename(path.with_extension("new"), path).unwrap();
    };
    for signal in [libc::SIGTERM, libc::SIGINT] {
        // SAFETY: the handler stores a number and does nothing else.
        unsafe { libc::signal(signal, note_signal as *const () as libc::sighandler_t) };
    }
    let meeting_point = (world.address.clone(), world.port);
    tell("pid", std::process::id().to_string());
    println!("rank {rank} begins with {} threads", std::env::var("RAYON_NUM_THREADS").unwrap_or_default());
    let task = std::env::var(TASK).unwrap_or_default();
    let joining = Joining {
        world,
        listener: launched.as_mut().and_then(|launched| launched.listener.take()),
        token: token().unwrap(),
        host: "here".into(),
        device: "CPU".into(),
        facts: Vec::new(),
        timeouts: Timeouts::from_environment().unwrap(),
        cancelled: Arc::new(AtomicBool::new(false)),
        last_resort: (!task.starts_with("hang ")).then(|| Box::new(last_resort) as LastResort),
    };
    let ended = Control::join(joining).and_then(|(control, _)| {
        if let Some(launched) = &launched {
            launched.log_to(&out.join("run")).unwrap();
        }
        println!("rank {rank} has met the others");
        // Nobody can join any more, once rank 0 knows that all have come.
        assert!(rank > 0 || TcpStream::connect(meeting_point).is_err());
        match work(&control, &task, &tell) {
            Ok(code) => control.leave().map(|()| code),
            Err(e) => {
                control.fail(&e.to_string());
                Err(e)
            }
        }
    });
    let (code, said) = match ended {
        Ok(code) => (code, String::new()),
        Err(e) => {
            eprintln!("ddpm-cuda: {e}");
            (1, e.to_string())
        }
    };
    tell("end", format!("{code} {said}"));
    code
}

fn work(control: &Control, task: &str, tell: &dyn Fn(&str, String)) -> Result<i32> {
    let pace = Duration::from_millis(u64::from(number(PACE, 5)));
    let steps = number(STEPS, 1_000_000);
    let mut done = 0;
    while done < steps {
        let signal = SIGNAL.load(Ordering::SeqCst);
        if signal != 0 {
            control.ask_to_stop(128 + signal as u8, "a signal");
        }
        if let Some(stop) = control.next(done + 1)? {
            assert_eq!(stop.after, done);
            return Ok(i32::from(stop.code));
        }
        let due = format!(" {} {}", control.rank(), done + 1);
        match task.strip_suffix(&due) {
            None => {}
            Some("fail") => return Err(ddpm_cuda::error::Error::Failed("no more memory".into())),
            Some("exit") => {
                eprintln!("my last words\u{1b}[31m");
                std::process::exit(3);
            }
            Some("panic") => panic!("planted"),
            Some("hang") => loop {
                thread::sleep(Duration::from_secs(3600));
            },
            Some(other) => panic!("no task: {other}"),
        }
        control.barrier("the step")?;
        thread::sleep(pace);
        done += 1;
        tell("done", done.to_string());
    }
    Ok(0)
}

/// Processes of a run, and what they have told. All are killed with it.
struct Job {
    out: TempDir,
    children: Vec<Child>,
}

impl Drop for Job {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// This binary in a role.
fn role_of(role: &str, out: &Path, variables: &[(&str, &str)]) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "role", "--nocapture", "--test-threads=1"]).stdin(Stdio::null());
    for name in ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "RAYON_NUM_THREADS", "DDPM_JOIN_TOKEN"] {
        command.env_remove(name);
    }
    command.env(ROLE, role).env(OUT, out).envs(variables.iter().copied());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A port of this machine that nobody uses, below those that the system gives to connections.
fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    loop {
        let port = 20_000 + (std::process::id() as u16 % 100 * 97 + NEXT.fetch_add(1, Ordering::Relaxed)) % 12_000;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}

impl Job {
    /// Ranks as torchrun would start them.
    fn ranks(size: usize, variables: &[(&str, &str)]) -> Self {
        let out = tempfile::tempdir().unwrap();
        let port = free_port().to_string();
        let child = |rank: usize| {
            let mut command = role_of("rank", out.path(), variables);
            command.env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string());
            command.env("WORLD_SIZE", size.to_string()).env("LOCAL_WORLD_SIZE", size.to_string());
            command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", &port).spawn().unwrap()
        };
        let children = (0..size).map(child).collect();
        Job { out, children }
    }

    /// The launcher and its four ranks.
    fn launched(variables: &[(&str, &str)]) -> Self {
        let out = tempfile::tempdir().unwrap();
        let children = vec![role_of("launcher", out.path(), variables).spawn().unwrap()];
        Job { out, children }
    }

    fn told(&self, rank: usize, what: &str) -> Option<String> {
        fs::read_to_string(self.out.path().join(format!("{rank}.{what}"))).ok()
    }

    fn pid(&self, rank: usize) -> u32 {
        self.told(rank, "pid").expect("the rank has begun").parse().unwrap()
    }

    fn done(&self, rank: usize) -> u32 {
        self.told(rank, "done").map_or(0, |text| text.parse().unwrap())
    }

    /// Waits until all ranks have done so many steps.
    fn wait_for_step(&self, size: usize, step: u32) {
        until("all ranks work", || (0..size).all(|rank| self.done(rank) >= step));
    }

    /// Exit codes of the children and how long it took, at most 10 seconds.
    fn ends(&mut self, but: &[usize]) -> (Vec<Option<i32>>, Duration) {
        let began = Instant::now();
        let rest: Vec<usize> = (0..self.children.len()).filter(|place| !but.contains(place)).collect();
        let mut codes = Vec::new();
        for place in rest {
            loop {
                if let Some(status) = self.children[place].try_wait().unwrap() {
                    codes.push(status.code());
                    break;
                }
                let waited = began.elapsed();
                assert!(waited < Duration::from_secs(10), "process {place} is still there");
                thread::sleep(Duration::from_millis(5));
            }
        }
        (codes, began.elapsed())
    }

    /// The output of the launcher when it has ended.
    fn output(mut self) -> (Output, TempDir) {
        let child = self.children.pop().unwrap();
        let output = child.wait_with_output().unwrap();
        (output, std::mem::replace(&mut self.out, tempfile::tempdir().unwrap()))
    }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < Duration::from_secs(60), "not after a minute: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn signal(pid: u32, number: i32) {
    // SAFETY: the call takes two numbers.
    assert_eq!(unsafe { libc::kill(pid as i32, number) }, 0, "signal {number} to {pid}");
}

/// The state of a process, such as 'T' for one that is stopped; none once it is dead.
fn state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next().filter(|state| !"ZX".contains(*state))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Numbers that look random, the same in each run.
struct Draws(u64);

impl Draws {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

#[test]
fn a_killed_rank_ends_the_others_who_name_it_within_ten_seconds() {
    let mut draws = Draws(20);
    let mut longest = Duration::ZERO;
    for round in 0..20 {
        let mut job = Job::ranks(4, &[]);
        let victim = draws.below(4) as usize;
        job.wait_for_step(4, 1 + draws.below(5) as u32);
        thread::sleep(Duration::from_millis(draws.below(40)));
        let pid = job.pid(victim);
        signal(pid, libc::SIGKILL);
        let (codes, took) = job.ends(&[victim]);
        longest = longest.max(took);
        assert_eq!(codes, [Some(1); 3], "round {round}");
        let want = format!("1 rank {victim} (here, process {pid}, CPU) has ended without a word, as if it was killed");
        for rank in (0..4).filter(|rank| *rank != victim) {
            let said = job.told(rank, "end").unwrap();
            assert!(said.starts_with(&want), "round {round}, rank {rank}: {said}");
        }
    }
    eprintln!("the others ended {longest:?} after a rank was killed at the latest");
}

#[test]
fn a_rank_that_stands_still_is_lost() {
    for victim in [0, 2] {
        let mut job = Job::ranks(3, &[("DDPM_SILENCE_SECONDS", "1.5")]);
        job.wait_for_step(3, 3);
        signal(job.pid(victim), libc::SIGSTOP);
        let (codes, took) = job.ends(&[victim]);
        assert_eq!(codes, [Some(1); 2]);
        assert!(took >= Duration::from_secs(1), "{took:?}");
        for rank in (0..3).filter(|rank| *rank != victim) {
            let said = job.told(rank, "end").unwrap();
            let want =
                format!("1 rank {victim} (here, process {}, CPU) has not been heard of for 1.5 s", job.pid(victim));
            assert!(said.starts_with(&want), "rank {rank}: {said}");
        }
        // Woken again, it finds that it is alone.
        signal(job.pid(victim), libc::SIGCONT);
        let (codes, _) = job.ends(&[]);
        assert_eq!(codes, [Some(1); 3]);
    }
}

#[test]
fn the_launcher_starts_ranks_that_end_with_it() {
    let job = Job::launched(&[(STEPS, "5")]);
    let (output, out) = job.output();
    let (said, errors) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{said}{errors}");
    assert_eq!(errors, "");
    // Rank 0 alone writes here, and all share the cores.
    let threads = thread::available_parallelism().map_or(1, |all| (all.get() / 4).max(1));
    assert!(said.contains(&format!("rank 0 begins with {threads} threads")), "{said}");
    assert!(said.contains("rank 0 has met the others") && !said.contains("rank 1"), "{said}");
    for rank in 0..4 {
        assert_eq!(fs::read_to_string(out.path().join(format!("{rank}.end"))).unwrap(), "0 ");
        assert_eq!(fs::read_to_string(out.path().join(format!("{rank}.done"))).unwrap(), "5");
        let log = fs::read_to_string(out.path().join(format!("run/ranks/{rank}.log")));
        match rank {
            0 => assert!(log.is_err()),
            _ => {
                let (log, begins) = (log.unwrap(), format!("rank {rank} begins with {threads} threads"));
                let met = log.find(&format!("rank {rank} has met the others")).unwrap();
                assert!(log.find(&begins).unwrap() < met, "{log}");
            }
        }
    }
}

#[test]
fn the_words_of_a_rank_that_fails_are_shown() {
    let (output, _) = Job::launched(&[(TASK, "fail 2 3")]).output();
    let errors = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(
        errors.contains("ddpm-cuda: rank 2 (here, process ") && errors.contains("failed at step 3: no more memory")
    );

    // One that cannot say why is quoted.
    let (output, out) = Job::launched(&[(TASK, "exit 2 3")]).output();
    let errors = text(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{errors}");
    let pid = fs::read_to_string(out.path().join("2.pid")).unwrap();
    let log = out.path().join("run/ranks/2.log");
    let ended =
        format!("launcher: rank 2 (process {pid}) has ended with exit code 3; the last lines of {}:", log.display());
    assert!(errors.contains(&ended), "{errors}");
    assert!(errors.contains("launcher:   my last words\\u{1b}[31m"), "{errors}");
    assert!(errors.contains("CPU) has ended without a word, as if it was killed"), "{errors}");

    // 101 is that of a panic; the others may have ended before.
    let (output, out) = Job::launched(&[(TASK, "panic 3 2")]).output();
    let errors = text(&output.stderr);
    assert!(matches!(output.status.code(), Some(1 | 101)), "{errors}");
    assert!(
        errors.contains("rank 3 (here, process ")
            && errors.contains("failed at step 2: panicked, a fault of the program")
    );
    assert!(fs::read_to_string(out.path().join("run/ranks/3.log")).unwrap().contains("planted"));
}

#[test]
fn a_killed_rank_of_the_launcher_is_named_with_its_signal() {
    for victim in [0, 3] {
        let job = Job::launched(&[]);
        job.wait_for_step(4, 2);
        let pid = job.pid(victim);
        signal(pid, libc::SIGKILL);
        let (output, _) = job.output();
        let errors = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{errors}");
        let ended = format!("launcher: rank {victim} (process {pid}) was ended by signal 9 (SIGKILL)");
        assert!(errors.contains(&ended), "{errors}");
    }
}

/// Wherever the signal comes from, every rank does the same steps, and the run has the code of the signal.
#[test]
fn a_signal_to_the_launcher_or_to_any_rank_stops_all_after_the_same_step() {
    for (rank, number, code) in
        [(None, libc::SIGTERM, 143), (Some(3), libc::SIGINT, 130), (Some(0), libc::SIGTERM, 143)]
    {
        let job = Job::launched(&[]);
        job.wait_for_step(4, 3);
        let pid = rank.map_or(job.children[0].id(), |rank| job.pid(rank));
        signal(pid, number);
        let (output, out) = job.output();
        assert_eq!(output.status.code(), Some(code), "{rank:?}: {}", text(&output.stderr));
        let told = |what: &str| {
            (0..4)
                .map(|rank| fs::read_to_string(out.path().join(format!("{rank}.{what}"))).unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!(told("end"), vec![format!("{code} "); 4]);
        let done = told("done");
        assert!(done.iter().all(|steps| *steps == done[0]), "{rank:?}: {done:?}");
    }
}

#[test]
fn a_killed_launcher_leaves_no_orphan() {
    let mut job = Job::launched(&[]);
    job.wait_for_step(4, 2);
    let pids = [0, 1, 2, 3].map(|rank| job.pid(rank));
    assert!(pids.iter().all(|pid| state(*pid).is_some()));
    job.children[0].kill().unwrap();
    job.children[0].wait().unwrap();
    let began = Instant::now();
    until("all ranks are dead", || pids.iter().all(|pid| state(*pid).is_none()));
    assert!(began.elapsed() < Duration::from_secs(5), "it took {:?}", began.elapsed());
}

/// Ctrl-Z and `fg`, with a pause longer than any silence that is borne.
#[test]
fn a_launcher_that_is_stopped_stops_its_ranks_and_goes_on_with_them() {
    let job = Job::launched(&[("DDPM_SILENCE_SECONDS", "1.5"), (PACE, "20"), (STEPS, "60")]);
    job.wait_for_step(4, 3);
    let launcher = job.children[0].id();
    let pids = [launcher, job.pid(0), job.pid(1), job.pid(2), job.pid(3)];
    signal(launcher, libc::SIGTSTP);
    until("all are stopped", || pids.iter().all(|pid| state(*pid) == Some('T')));
    let done = [0, 1, 2, 3].map(|rank| job.done(rank));
    thread::sleep(Duration::from_secs(4));
    assert_eq!([0, 1, 2, 3].map(|rank| job.done(rank)), done);
    signal(launcher, libc::SIGCONT);
    let (output, out) = job.output();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(fs::read_to_string(out.path().join("3.done")).unwrap(), "60");
}

/// A rank that neither works nor ends is killed, and said to be.
#[test]
fn a_rank_that_hangs_is_killed_by_the_launcher() {
    let (output, out) = Job::launched(&[(TASK, "hang 1 3"), ("DDPM_WAIT_SECONDS", "2")]).output();
    let errors = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    let pid = fs::read_to_string(out.path().join("1.pid")).unwrap();
    assert!(
        errors.contains(&format!("rank 1 (here, process {pid}, CPU) has not come to the barrier of the step within 2"))
    );
    let killed = "launcher: killed, since still there 20 s after rank ";
    assert!(errors.contains(killed) && errors.contains(&format!(" had ended: rank 1 (process {pid})")), "{errors}");
    assert_eq!(state(pid.parse().unwrap()), None);
}

/// What a rank gets from a launcher that is not there.
#[test]
fn a_rank_without_its_launcher_ends() {
    let out = tempfile::tempdir().unwrap();
    let mut command = role_of("rank", out.path(), &[("DDPM_LAUNCHER", "1"), ("RANK", "1")]);
    let output = command.output().unwrap();
    assert!(!output.status.success());
    let said = text(&output.stderr) + &text(&output.stdout);
    assert!(said.contains("the launcher of this rank, process 1, has ended"), "{said}");
}
