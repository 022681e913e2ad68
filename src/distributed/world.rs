//! Which rank a process is, and where the ranks meet, from the variables that its launcher sets.
//!
//! `RANK` and `WORLD_SIZE` are torchrun's and of everything that imitates it, and they are read without being asked
//! for. Those of SLURM and MPI are read only on demand: inside a batch job SLURM sets `SLURM_PROCID=0` and
//! `SLURM_NTASKS=8` for a plain shell too, and a program that took them for its own would wait for seven ranks that
//! nobody starts.

use crate::error::{Error, Result};
use crate::names::names;
use crate::usage;

use super::message::LONGEST_TOKEN;
use super::node_list::first_host;

/// The most ranks of a run.
pub const MOST_RANKS: usize = 4096;
/// The port of rank 0 if nothing says another one, as PyTorch has it.
const PORT: u16 = 29_500;

/// A launcher whose variables are read on demand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// `srun`.
    Slurm,
    /// `mpirun` of Open MPI, MPICH or Intel MPI.
    Mpi,
}

names!(Launcher { Slurm = "slurm", Mpi = "mpi" });

/// The place of a process among those that train together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct World {
    /// Its number, from 0 to `size - 1`.
    pub rank: usize,
    /// How many there are.
    pub size: usize,
    /// Its number among those of its machine.
    pub local_rank: usize,
    /// How many its machine has, if the launcher says so; [`Control`](super::Control) knows it of all machines.
    pub local_size: Option<usize>,
    /// Name or address of the machine of rank 0, where that rank listens.
    pub address: String,
    /// The port there.
    pub port: u16,
}

/// An environment variable; an empty one counts as not set.
pub(super) fn environment(name: &str) -> Option<String> {
    let value = std::env::var_os(name).filter(|value| !value.is_empty())?;
    Some(value.to_string_lossy().into_owned())
}

/// The secret that ranks show each other, from `DDPM_JOIN_TOKEN`.
///
/// # Errors
/// `Error::Usage` for one that is too long.
pub fn token() -> Result<Option<String>> {
    let token = environment("DDPM_JOIN_TOKEN");
    if let Some(token) = token.as_ref().filter(|token| token.len() > LONGEST_TOKEN) {
        usage!("DDPM_JOIN_TOKEN has {} bytes; {LONGEST_TOKEN} are the most", token.len());
    }
    Ok(token)
}

impl World {
    /// A process that trains alone.
    pub fn alone() -> Self {
        World { rank: 0, size: 1, local_rank: 0, local_size: Some(1), address: "127.0.0.1".into(), port: 0 }
    }

    /// What the environment says: torchrun's variables, or those of `launcher`; without any, a process alone.
    ///
    /// # Errors
    /// `Error::Usage` for variables that are missing, that are no numbers, or that contradict each other.
    pub fn from_environment(launcher: Option<Launcher>) -> Result<Self> {
        World::from_variables(launcher, &environment)
    }

    /// [`from_environment`](Self::from_environment) with `get` for the environment.
    pub fn from_variables(launcher: Option<Launcher>, get: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let variables = Variables { get };
        let world = match launcher {
            None => variables.torchrun()?,
            Some(Launcher::Slurm) => variables.slurm()?,
            Some(Launcher::Mpi) => variables.mpi()?,
        };
        world.check()?;
        Ok(world)
    }

    fn check(&self) -> Result<()> {
        let World { rank, size, local_rank, local_size, .. } = *self;
        if size == 0 || size > MOST_RANKS {
            usage!("the number of ranks is {size}: 1 to {MOST_RANKS} are possible");
        }
        if rank >= size {
            usage!("rank {rank} of {size} ranks: they are counted from 0, so the last one is {}", size - 1);
        }
        let most = local_size.unwrap_or(size);
        if most == 0 || most > size || local_rank >= most {
            usage!(
                "local rank {local_rank} of {most} on its machine, of {size} in all: they are counted from 0, and a \
                 machine has no more than all"
            );
        }
        if local_rank > rank {
            usage!(
                "rank {rank} has the local rank {local_rank}: ranks of a machine must be numbered one after the other"
            );
        }
        Ok(())
    }
}

struct Variables<'a> {
    get: &'a dyn Fn(&str) -> Option<String>,
}

impl Variables<'_> {
    fn text(&self, name: &str) -> Option<String> {
        (self.get)(name).map(|text| text.trim().to_string()).filter(|text| !text.is_empty())
    }

    fn number(&self, name: &str) -> Result<Option<usize>> {
        let Some(text) = self.text(name) else { return Ok(None) };
        match text.parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) => usage!("{name}={text}: a whole number is expected"),
        }
    }

    /// A number that must be there, or the sentence `without` about it.
    fn needed(&self, name: &str, without: &str) -> Result<usize> {
        self.number(name)?.ok_or_else(|| Error::Usage(format!("{name} is not set, {without}")))
    }

    fn port(&self, name: &str) -> Result<Option<u16>> {
        match self.number(name)? {
            None => Ok(None),
            Some(port) => match u16::try_from(port) {
                Ok(port) if port > 0 => Ok(Some(port)),
                _ => usage!("{name}={port}: a port from 1 to 65535 is expected"),
            },
        }
    }

    /// The address of rank 0, if it is given, without the brackets that IPv6 has in URLs.
    fn address(&self) -> Option<String> {
        let text = self.text("MASTER_ADDR")?;
        let inner = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
        Some(inner.unwrap_or(&text).to_string())
    }

    fn torchrun(&self) -> Result<World> {
        const ALL: [&str; 4] = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"];
        let set: Vec<&str> = ALL.into_iter().filter(|name| self.text(name).is_some()).collect();
        if set.is_empty() {
            return Ok(World::alone());
        }
        let without = |name: &str, what: &str| {
            let others: Vec<&str> = set.iter().copied().filter(|other| *other != name).collect();
            let are = if others.len() == 1 { "is" } else { "are" };
            format!("though {} {are}: {what}", others.join(", "))
        };
        let whole = "a launcher such as torchrun sets all of them, and a process alone needs none";
        let rank = self.needed("RANK", &without("RANK", whole))?;
        let size = self.needed("WORLD_SIZE", &without("WORLD_SIZE", whole))?;
        if size == 1 {
            let local_rank = self.number("LOCAL_RANK")?.unwrap_or(0);
            return Ok(World { rank, local_rank, ..World::alone() });
        }
        let which = "it is the number of the process on its machine and says which GPU is its own";
        let local_rank = self.needed("LOCAL_RANK", &without("LOCAL_RANK", which))?;
        let local_size = self.number("LOCAL_WORLD_SIZE")?;
        let Some(address) = self.address() else {
            usage!("MASTER_ADDR is not set, {}", without("MASTER_ADDR", "it is the machine of rank 0"));
        };
        let Some(port) = self.port("MASTER_PORT")? else {
            usage!("MASTER_PORT is not set, {}", without("MASTER_PORT", "it is the port of rank 0"));
        };
        // torchrun listens there itself then, and hands the port to its workers as one to connect to.
        let taken = self.text("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|text| text == "True");
        let port = match self.port("DDPM_PORT")? {
            Some(own) => own,
            None if taken => port.checked_add(1).unwrap_or(port - 1),
            None => port,
        };
        Ok(World { rank, size, local_rank, local_size, address, port })
    }

    fn slurm(&self) -> Result<World> {
        let without = "so this is no task of a job step: start the ranks with srun, or leave --launch slurm out";
        let Some(list) = self.text("SLURM_STEP_NODELIST") else {
            usage!("SLURM_STEP_NODELIST is not set, {without}");
        };
        let rank = self.needed("SLURM_PROCID", without)?;
        let size = match self.number("SLURM_STEP_NUM_TASKS")? {
            Some(size) => size,
            None => self.needed("SLURM_NTASKS", without)?,
        };
        let local_rank = self.needed("SLURM_LOCALID", without)?;
        let address = match self.address() {
            Some(address) => address,
            None => first_host(&list).map_err(|what| {
                Error::Usage(format!(
                    "SLURM_STEP_NODELIST={}: {what}; set MASTER_ADDR to the host of rank 0",
                    crate::text::cut(&list)
                ))
            })?,
        };
        let port = match (self.port("DDPM_PORT")?, self.port("MASTER_PORT")?) {
            (Some(port), _) | (None, Some(port)) => port,
            // Jobs that share a machine must not share a port. Every rank finds the same one.
            (None, None) => {
                let job = self.number("SLURM_JOB_ID")?.unwrap_or(0) % 10_000;
                let step = self.number("SLURM_STEP_ID")?.unwrap_or(0) % 10_000;
                20_000 + ((job + step) % 10_000) as u16
            }
        };
        Ok(World { rank, size, local_rank, local_size: None, address, port })
    }

    fn mpi(&self) -> Result<World> {
        let without = "so no mpirun has started this process: start the ranks with it, or leave --launch mpi out";
        let open_mpi = self.text("OMPI_COMM_WORLD_RANK").is_some() || self.text("PMI_RANK").is_none();
        let [rank, size, local_rank, local_size] = match open_mpi {
            true => [
                "OMPI_COMM_WORLD_RANK",
                "OMPI_COMM_WORLD_SIZE",
                "OMPI_COMM_WORLD_LOCAL_RANK",
                "OMPI_COMM_WORLD_LOCAL_SIZE",
            ],
            // Hydra's, of MPICH and Intel MPI.
            false => ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"],
        };
        let rank = self.needed(rank, without)?;
        let size = self.needed(size, without)?;
        let local_rank = self.needed(local_rank, "though the rank is: it says which GPU is the process's own")?;
        let local_size = self.number(local_size)?;
        let address = match self.address() {
            Some(address) => address,
            None if local_size == Some(size) => "127.0.0.1".into(),
            None => {
                usage!("MASTER_ADDR is not set, and MPI does not say where rank 0 is: set it to the host of rank 0")
            }
        };
        let port = match self.port("DDPM_PORT")? {
            Some(port) => port,
            None => self.port("MASTER_PORT")?.unwrap_or(PORT),
        };
        Ok(World { rank, size, local_rank, local_size, address, port })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The world of `NAME=VALUE` variables.
    fn world(launcher: Option<Launcher>, variables: &str) -> Result<World> {
        let variables: Vec<(&str, &str)> =
            variables.split_whitespace().map(|pair| pair.split_once('=').expect("NAME=VALUE")).collect();
        let get = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string());
        World::from_variables(launcher, &get)
    }

    fn refusal(launcher: Option<Launcher>, variables: &str) -> String {
        let error = world(launcher, variables).expect_err(variables);
        assert!(matches!(error, Error::Usage(_)), "{error}");
        error.to_string()
    }

    const TORCHRUN: &str =
        "RANK=5 WORLD_SIZE=8 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4 MASTER_ADDR=node1 MASTER_PORT=29400 GROUP_RANK=1";

    #[test]
    fn torchruns_variables() {
        let want =
            World { rank: 5, size: 8, local_rank: 1, local_size: Some(4), address: "node1".into(), port: 29_400 };
        assert_eq!(world(None, TORCHRUN).unwrap(), want);
        assert_eq!(world(None, "").unwrap(), World::alone());
        // Where torchrun serves the port itself, the next one is rank 0's; DDPM_PORT names another.
        let port = |more: &str| world(None, &format!("{TORCHRUN} {more}")).unwrap().port;
        assert_eq!(port("TORCHELASTIC_USE_AGENT_STORE=True"), 29_401);
        assert_eq!(port("TORCHELASTIC_USE_AGENT_STORE=False"), 29_400);
        assert_eq!(port("TORCHELASTIC_USE_AGENT_STORE=True DDPM_PORT=7"), 7);
        let last = TORCHRUN.replace("29400", "65535 TORCHELASTIC_USE_AGENT_STORE=True");
        assert_eq!(world(None, &last).unwrap().port, 65_534);
        let ipv6 = TORCHRUN.replace("node1", "[fe80::1]");
        assert_eq!(world(None, &ipv6).unwrap().address, "fe80::1");
        // One rank needs no meeting point.
        assert_eq!(world(None, "RANK=0 WORLD_SIZE=1").unwrap(), World::alone());
        // The variables of a batch job start nothing.
        assert_eq!(world(None, "SLURM_PROCID=0 SLURM_NTASKS=8 SLURM_LOCALID=0").unwrap(), World::alone());
        assert_eq!(world(None, "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=8 PMI_RANK=3").unwrap(), World::alone());
    }

    #[test]
    fn torchruns_variables_that_are_missing_or_contradict_each_other() {
        let without = |name: &str| {
            let kept = TORCHRUN.split(' ').filter(|pair| !pair.starts_with(&format!("{name}=")));
            refusal(None, &kept.collect::<Vec<_>>().join(" "))
        };
        assert!(without("RANK").starts_with("RANK is not set, though WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE are: "));
        assert!(without("WORLD_SIZE").starts_with("WORLD_SIZE is not set, though RANK, LOCAL_RANK, "));
        assert!(without("LOCAL_RANK").starts_with("LOCAL_RANK is not set, though RANK, WORLD_SIZE, "));
        assert!(without("MASTER_ADDR").starts_with("MASTER_ADDR is not set, though RANK, "));
        assert!(without("MASTER_PORT").starts_with("MASTER_PORT is not set, though RANK, "));
        assert!(refusal(None, "LOCAL_RANK=0").starts_with("RANK is not set, though LOCAL_RANK is: "));
        for (from, to, says) in [
            ("RANK=5 ", "RANK=five ", "RANK=five: a whole number"),
            ("RANK=5 ", "RANK=-1 ", "RANK=-1: a whole number"),
            ("RANK=5 ", "RANK=8 ", "rank 8 of 8 ranks"),
            ("WORLD_SIZE=8", "WORLD_SIZE=0", "the number of ranks is 0"),
            ("WORLD_SIZE=8", "WORLD_SIZE=4000000000", "the number of ranks is 4000000000: 1 to 4096"),
            ("WORLD_SIZE=8", "WORLD_SIZE=99999999999999999999999", "a whole number"),
            ("LOCAL_RANK=1", "LOCAL_RANK=4", "local rank 4 of 4 on its machine"),
            ("LOCAL_WORLD_SIZE=4", "LOCAL_WORLD_SIZE=9", "of 9 on its machine, of 8 in all"),
            ("RANK=5 WORLD_SIZE=8 LOCAL_RANK=1", "RANK=1 WORLD_SIZE=8 LOCAL_RANK=2", "rank 1 has the local rank 2"),
            ("29400", "0", "MASTER_PORT=0: a port from 1 to 65535"),
            ("29400", "65536", "MASTER_PORT=65536: a port"),
            ("29400", "http", "MASTER_PORT=http: a whole number"),
        ] {
            let said = refusal(None, &TORCHRUN.replacen(from, to, 1));
            assert!(said.contains(says), "{to}: {said:?} does not say {says:?}");
        }
        assert!(refusal(None, "RANK=1 WORLD_SIZE=1").contains("rank 1 of 1 ranks"));
    }

    #[test]
    fn slurms_variables() {
        let step = "SLURM_PROCID=3 SLURM_STEP_NUM_TASKS=4 SLURM_NTASKS=16 SLURM_LOCALID=1 SLURM_JOB_ID=1234567 \
                    SLURM_STEP_ID=2 SLURM_STEP_NODELIST=gnode[07,10-12]";
        let slurm = Some(Launcher::Slurm);
        let want = World { rank: 3, size: 4, local_rank: 1, local_size: None, address: "gnode07".into(), port: 24_569 };
        assert_eq!(world(slurm, step).unwrap(), want);
        assert_eq!(world(slurm, &step.replace("SLURM_STEP_NUM_TASKS=4", "")).unwrap().size, 16);
        let given = world(slurm, &format!("{step} MASTER_ADDR=10.0.0.7 MASTER_PORT=29501")).unwrap();
        assert_eq!((given.address.as_str(), given.port), ("10.0.0.7", 29_501));
        assert_eq!(world(slurm, &format!("{step} MASTER_PORT=29501 DDPM_PORT=9")).unwrap().port, 9);
        // In the shell of a batch job, outside a step.
        let said = refusal(slurm, "SLURM_PROCID=0 SLURM_NTASKS=8 SLURM_LOCALID=0 SLURM_JOB_ID=7");
        assert!(said.starts_with("SLURM_STEP_NODELIST is not set, ") && said.contains("srun"), "{said}");
        for name in ["SLURM_PROCID", "SLURM_LOCALID"] {
            let said = refusal(slurm, &step.replace(name, "X"));
            assert!(said.starts_with(&format!("{name} is not set, ")), "{said}");
        }
        let said = refusal(slurm, &step.replace("gnode[07,10-12]", "gnode[07"));
        assert!(said.contains("SLURM_STEP_NODELIST=gnode[07: a bracket is not closed; set MASTER_ADDR"), "{said}");
        let huge = world(slurm, &step.replace("1234567", "18446744073709551615")).unwrap();
        assert_eq!(huge.port, 20_000 + 1615 + 2);
    }

    #[test]
    fn mpis_variables() {
        let open = "OMPI_COMM_WORLD_RANK=2 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=0 \
                    OMPI_COMM_WORLD_LOCAL_SIZE=2";
        let hydra = "PMI_RANK=2 PMI_SIZE=4 MPI_LOCALRANKID=0 MPI_LOCALNRANKS=2";
        let mpi = Some(Launcher::Mpi);
        for variables in [open, hydra] {
            let want =
                World { rank: 2, size: 4, local_rank: 0, local_size: Some(2), address: "n0".into(), port: 29_500 };
            assert_eq!(world(mpi, &format!("{variables} MASTER_ADDR=n0")).unwrap(), want);
            let said = refusal(mpi, variables);
            assert!(said.starts_with("MASTER_ADDR is not set, and MPI does not say where rank 0 is"), "{said}");
            // All on one machine, which needs no name.
            let one = variables.replace("LOCAL_SIZE=2", "LOCAL_SIZE=4").replace("NRANKS=2", "NRANKS=4");
            assert_eq!(world(mpi, &one).unwrap().address, "127.0.0.1");
        }
        // Open MPI under SLURM has both.
        let both = format!("{open} {} MASTER_ADDR=n0", hydra.replace("PMI_RANK=2", "PMI_RANK=9"));
        assert_eq!(world(mpi, &both).unwrap().rank, 2);
        assert!(refusal(mpi, "").starts_with("OMPI_COMM_WORLD_RANK is not set, so no mpirun has started"));
        assert!(refusal(mpi, "PMI_RANK=0 PMI_SIZE=2").starts_with("MPI_LOCALRANKID is not set, though the rank is"));
    }
}
